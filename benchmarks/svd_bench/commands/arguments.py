"""What the commands share: lists in an argument, the command line, progress, the printed document."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from svd_bench.documents.results import Results
    from svd_bench.documents.table import Table
    from svd_bench.measuring.progress import Progress


def names(value: str) -> list[str]:
    """ "a, b" as a list."""
    return [name.strip() for name in value.split(",") if name.strip()]


def command_line() -> list[str]:
    return ["svd-bench", *sys.argv[1:]]


def progress() -> Progress:
    """Writes a line to stderr, with the seconds since now."""
    started = time.monotonic()
    return lambda line: typer.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True)


def show_tables(tables: Sequence[Table], markdown: bool = False) -> None:
    for table in tables:
        typer.echo(f"{table.markdown() if markdown else table.text()}\n")


def show_results(results: Results, tables: Sequence[Table]) -> None:
    """Tables, warnings, and on the last line the document."""
    show_tables(tables)
    for warning in results.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(results.model_dump_json())
