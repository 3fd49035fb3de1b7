"""Command `svd-engine batch`: a folder or a list of pictures in, a folder of videos and a table out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine.cli import console
from svd_engine.cli.call_options import call_options, given_options
from svd_engine.cli.engine_options import EngineOptions, engine_options

if TYPE_CHECKING:
    from svd_engine.opening import Opening
    from svd_engine.serving.batch.items import Item
    from svd_engine.serving.batch.records import Record, Results


class VideoFormatOption(StrEnum):
    """Those of `svd_engine.serving.batch.items.VIDEO_FORMATS`."""

    mp4 = "mp4"
    webm = "webm"
    gif = "gif"
    webp = "webp"
    png = "png"


@engine_options
@call_options
def batch(
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|LIST",
            help="Folder of pictures, or a list: .csv with a header, or .jsonl with an object a line. "
            "Columns: image (a path, from the list's folder on), output (name of the video, default the "
            "picture's), and any of the parameters below, such as seed, steps or motion_bucket_id; the "
            "options say what a row leaves empty.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for the videos, summary.csv, and an error file for each failure."
        ),
    ],
    *,
    opened: EngineOptions,
    video_format: Annotated[
        VideoFormatOption, typer.Option("--format", help="Format of the videos; png is a contact sheet.")
    ] = VideoFormatOption.mp4,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the work out with Ray: auto or HOST:PORT for a cluster that runs, local to start Ray "
            "on this machine. It gives each worker its device. Default: one video after the other in this "
            "process.",
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="With --ray: workers, one a GPU. Default all GPUs.", min=1)
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="With --ray: workers on the CPU instead, one a CPU slot.", min=1)
    ] = None,
    **call: Any,
) -> None:
    """Generate a video of every picture in a folder or a list; run again, make what is missing or changed.

    A picture that cannot be used leaves an error file, and the others are made: the exit code is 1 then.
    """
    opened.check()
    if ray is None and (gpus is not None or cpus is not None):
        raise typer.BadParameter("--gpus and --cpus belong to --ray ADDRESS; --ray local needs no cluster")
    if gpus is not None and cpus is not None:
        raise typer.BadParameter("pass either --gpus N or --cpus N")
    if ray is not None and opened.device != "auto":
        raise typer.BadParameter("--device does nothing with --ray: pass --gpus N or --cpus N")
    chosen = given_options(context, call)
    if {"sigmas", "num_inference_steps"} <= chosen:
        raise typer.BadParameter("pass either --steps or --sigmas")
    console.show_notices()

    from svd_engine.request import check
    from svd_engine.serving.batch.items import read_items
    from svd_engine.serving.batch.records import Results

    check(call)
    opening = opened.opening(call["num_frames"]).from_anywhere()
    if opened.preset is not None:
        call = opened.with_preset(call, chosen, opening.model)
    items = read_items(source, call, video_format.value)
    results = Results(output.absolute(), f".{video_format.value}", opening.digest, console.worded)
    with results.opened():
        results.check(items)
        failures = _make(opening, items, results, ray, gpus, cpus)
    raise typer.Exit(int(failures > 0))


def _make(
    opening: Opening,
    items: Sequence[Item],
    results: Results,
    ray: str | None,
    gpus: int | None,
    cpus: int | None,
) -> int:
    """Makes what is not whole, shows how far it is, and writes the table, also after Ctrl-C.

    Returns how many failed.
    """
    records = {item.name: record for item in items if (record := results.whole(item))}
    todo = [item for item in items if item.name not in records]
    typer.echo(f"{len(items)} pictures, {len(records)} of them done already", err=True)
    made: set[str] = set()
    try:
        for record in _with_progress(_run(opening, todo, results, ray, gpus, cpus), len(todo)):
            records[record.name] = record
            made.add(record.name)
    finally:
        table = results.write_table(items, records, made)
        failures = [record for record in records.values() if record.error]
        waiting = len(items) - len(records)
        typer.echo(
            f"{len(made) - len(failures)} made, {len(failures)} failed, {len(items) - len(todo)} kept"
            + (f", {waiting} waiting: the same command goes on with them" if waiting else "")
        )
        typer.echo(f"wrote {table}")
    return len(failures)


def _run(
    opening: Opening,
    todo: Sequence[Item],
    results: Results,
    ray: str | None,
    gpus: int | None,
    cpus: int | None,
) -> Iterator[Record]:
    if not todo:  # opens nothing
        return iter(())
    if ray is None:
        from svd_engine.serving.batch.in_process import make_here

        return make_here(opening, todo, results)
    from svd_engine.serving.batch.on_ray import make_on_ray

    return make_on_ray(opening, todo, results, ray, gpus, cpus)


def _with_progress(records: Iterator[Record], count: int) -> Iterator[Record]:
    """Passes records on, and shows how many there are, their rate and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.monotonic()
    columns = (
        TextColumn("videos"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("videos", total=count, rate="")
        for done, record in enumerate(records, start=1):
            minutes = (time.monotonic() - began) / 60
            rate = f"{done / minutes:.3g} a minute"
            bar.update(task, completed=done, rate=rate)
            if record.error:
                bar.console.print(
                    f"{record.name}: {record.error.splitlines()[0]}", markup=False, soft_wrap=True
                )
            elif not bar.console.is_terminal:  # a log has lines in place of the bar
                left = (count - done) * minutes / done
                bar.console.print(
                    f"{done} of {count}, {rate}, {left:.0f} minutes left: {record.name}",
                    markup=False,
                    soft_wrap=True,
                )
            yield record
