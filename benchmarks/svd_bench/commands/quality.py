"""Command of `svd-bench` about quality: arguments in, exit codes out.  Measures nothing itself."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from svd_bench.commands.arguments import command_line, progress, show_tables
from svd_engine.cli import console
from svd_engine.cli.options import Variant

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class QualityPart(StrEnum):
    all = "all"
    targets = "targets"
    settings = "settings"


@app.command("quality")
def quality_command(
    checkpoint: Annotated[
        str, typer.Option(help="Checkpoint to measure: demo, a diffusers folder, a file, or a hub id.")
    ] = "demo",
    variant: Variant = None,
    only: Annotated[
        QualityPart,
        typer.Option(
            help="Part to run. targets: quality on held-out photographs; settings: cost of inexact settings."
        ),
    ] = QualityPart.all,
    photographs: Annotated[
        int,
        typer.Option(
            min=1, max=5, help="Number of photographs to animate; the autoencoder is measured on all."
        ),
    ] = 5,
    markdown: Annotated[bool, typer.Option(help="Print tables as Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="File for the JSON document.")] = None,
) -> None:
    """Measure the quality of videos of held-out photographs; exit with code 1 if a target is missed."""
    if out is not None:
        console.check_folder(out)

    import torch

    from svd_bench.measuring.environment import environment
    from svd_bench.quality.document import QualityDocument, quality_tables
    from svd_bench.quality.evaluate import evaluate

    where = environment(torch.device("cpu"), None, command_line())
    figures, motions, settings = evaluate(
        checkpoint,
        photographs,
        progress(),
        only.value,
        variant,
    )
    document = QualityDocument(
        environment=where, checkpoint=checkpoint, figures=figures, motions=motions, settings=settings
    )
    show_tables([table for table in quality_tables(document) if table.rows], markdown)
    text = document.model_dump_json()
    typer.echo(text)
    if out is not None:
        console.write_text(out, text + "\n")
    raise SystemExit(0 if all(f.met is not False for f in figures) else 1)
