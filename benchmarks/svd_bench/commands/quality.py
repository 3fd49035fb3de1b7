"""Command of `svd-bench` about quality: arguments in, exit codes out.  Measures nothing itself."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svd_bench.commands.arguments import command_line, progress, show_tables
from svd_engine.cli import console
from svd_engine.cli.options import Variant

if TYPE_CHECKING:
    from svd_bench.documents.strict import StrictModel
    from svd_bench.documents.table import Table

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
    samplers: Annotated[
        bool,
        typer.Option(
            "--samplers",
            help="Measure samplers and schedules at 4 to 50 evaluations instead, against 100 Euler steps.",
        ),
    ] = False,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse",
            help="Measure reuse between evaluations instead, against the whole denoiser in every step.",
        ),
    ] = False,
    half: Annotated[
        bool,
        typer.Option(
            "--half",
            help="Measure half precision instead, its rewrites added one at a time, against float32.",
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --samplers: file for a plot of the figures, SVG.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames of --samplers, --reuse or --half; default the checkpoint's own."),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=1, help="Height of --samplers, --reuse or --half; default the checkpoint's own."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Width of --samplers, --reuse or --half; default the checkpoint's own."),
    ] = None,
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
    if plot is not None and not samplers:
        raise typer.BadParameter("--plot belongs to --samplers")
    if any((frames, height, width)) and not (samplers or reuse or half):
        raise typer.BadParameter("--frames, --height and --width belong to --samplers, --reuse and --half")
    if samplers + reuse + half + (only is not QualityPart.all) > 1:
        raise typer.BadParameter("pass one of --only, --samplers, --reuse and --half")
    for path in (out, plot):
        if path is not None:
            console.check_folder(path)
    if samplers:
        _samplers(checkpoint, variant, photographs, (frames, height, width), markdown, out, plot)
        return
    if reuse:
        _reuse(checkpoint, variant, (frames, height, width), markdown, out)
        return
    if half:
        _half(checkpoint, variant, (frames, height, width), markdown, out)
        return

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
    _show(document, [table for table in quality_tables(document) if table.rows], markdown, out)
    raise SystemExit(0 if all(f.met is not False for f in figures) else 1)


def _show(document: StrictModel, tables: list[Table], markdown: bool, out: Path | None) -> None:
    show_tables(tables, markdown)
    text = document.model_dump_json()
    typer.echo(text)
    if out is not None:
        console.write_text(out, text + "\n")


def _samplers(
    checkpoint: str,
    variant: str | None,
    photographs: int,
    shape: tuple[int | None, int | None, int | None],
    markdown: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    import torch

    from svd_bench.measuring.environment import environment
    from svd_bench.quality.document import samplers_tables
    from svd_bench.quality.samplers import Shape, measure_samplers
    from svd_bench.report import plots

    where = environment(torch.device("cpu"), None, command_line())
    document = measure_samplers(checkpoint, photographs, Shape(*shape), where, progress(), variant)
    _show(document, samplers_tables(document), markdown, out)
    if plot is not None:
        console.write_text(plot, plots.samplers(document) + "\n")


def _reuse(
    checkpoint: str,
    variant: str | None,
    shape: tuple[int | None, int | None, int | None],
    markdown: bool,
    out: Path | None,
) -> None:
    import torch

    from svd_bench.measuring.environment import environment
    from svd_bench.quality.document import reuse_table
    from svd_bench.quality.reuse import measure_reuse
    from svd_bench.quality.samplers import Shape

    where = environment(torch.device("cpu"), None, command_line())
    document = measure_reuse(checkpoint, Shape(*shape), where, progress(), variant)
    _show(document, [reuse_table(document)], markdown, out)


def _half(
    checkpoint: str,
    variant: str | None,
    shape: tuple[int | None, int | None, int | None],
    markdown: bool,
    out: Path | None,
) -> None:
    import torch

    from svd_bench.measuring.environment import environment
    from svd_bench.quality.document import half_table
    from svd_bench.quality.half import measure_half
    from svd_bench.quality.samplers import Shape

    where = environment(torch.device("cpu"), None, command_line())
    document = measure_half(checkpoint, Shape(*shape), where, progress(), variant)
    _show(document, [half_table(document)], markdown, out)
