"""Command `svd-bench`: arguments in, progress and exit codes out.  Measures nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svd_bench import compiled_cli, quality_cli, report_cli
from svd_engine.backends.registry import BACKENDS
from svd_engine.cli import console
from svd_engine.cli.options import DTypeOption, FamilyOption, Variant, VersionFlag

if TYPE_CHECKING:
    from svd_bench.results import Results

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class Rungs(StrEnum):
    all = "all"
    ends = "ends"


Checkpoint = Annotated[
    str | None,
    typer.Option(help="Checkpoint: svd, svd-xt, svd-xt-1-1, demo, a diffusers folder, or a hub id."),
]
RandomWeights = Annotated[
    FamilyOption | None,
    typer.Option(help="Architecture to measure with seeded random weights, without a checkpoint."),
]
Frames = Annotated[
    int | None, typer.Option(help="Number of frames; default the bundle's or checkpoint's own.")
]
Pixels = Annotated[int | None, typer.Option(help="In pixels; default the bundle's or checkpoint's own.")]
Chunk = Annotated[int | None, typer.Option(help="Frames per decoder call; default all.")]
Device = Annotated[str, typer.Option(help="Device to measure: auto, cpu, cuda or cuda:N.")]
Type = Annotated[
    DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
]
Repeat = Annotated[int, typer.Option(min=1, help="Timed calls per subject.")]
Memory = Annotated[bool, typer.Option(help="Measure peak memory of each subject in its own process.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the JSON document, updated after each row.")]


@app.callback()
def root(version: VersionFlag = False) -> None:
    """Measure speed, memory and quality of Stable Video Diffusion on this machine."""


@app.command()
def run(
    bundle: Annotated[
        Path | None, typer.Option(help="Bundle to measure; its checkpoint must be available.")
    ] = None,
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = None,
    backends: Annotated[
        str | None,
        typer.Option(help=f"Backends, separated by commas: {', '.join(BACKENDS)}; default two of them."),
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Peers to compare with: diffusers, diffusers-compile, or none.")
    ] = "diffusers",
    stages: Annotated[str, typer.Option(help="Stages to measure, separated by commas; default all.")] = "",
    frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    decode_chunk: Chunk = None,
    dtype: Type = DTypeOption.auto,
    device: Device = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the whole video.")] = 25,
    repeat: Repeat = 5,
    memory: Memory = True,
    out: Out = None,
) -> None:
    """Time each stage and the whole video, in turns with the peers, on the same inputs."""
    if [bundle, checkpoint, random_weights].count(None) != 2:
        raise typer.BadParameter("pass one of --bundle, --checkpoint and --random-weights")
    if variant and checkpoint is None:
        raise typer.BadParameter("--variant belongs to --checkpoint")
    if bundle is not None and dtype is not DTypeOption.auto:
        raise typer.BadParameter("--dtype belongs to a checkpoint; a bundle has its own")

    from svd_bench.running import Asked, measure_run
    from svd_bench.scopes import scopes
    from svd_bench.views import VIEWS

    asked = Asked(
        bundle=bundle,
        checkpoint=f"random:{random_weights.value}" if random_weights else checkpoint,
        variant=variant,
        backends=None if backends is None else names(backends),
        peers=[] if peers == "none" else names(peers),
        stages=names(stages),
        frames=frames,
        height=height,
        width=width,
        decode_chunk=decode_chunk,
        dtype=dtype.value,
        device=device,
        steps=steps,
        repeat=repeat,
        memory=memory,
        out=out,
        command=command(),
    )
    results = measure_run(asked, progress())
    tables = [table.text() for scope in scopes(results) for view in VIEWS.values() for table in view(scope)]
    show(results, tables)


@app.command()
def ladder(
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = None,
    networks: Annotated[
        str, typer.Option(help="Networks to measure: unet, vae_decoder.")
    ] = "unet,vae_decoder",
    backends: Annotated[
        str, typer.Option(help="Backends to measure: eager, compiled, onnxruntime.")
    ] = "eager,onnxruntime",
    rungs: Annotated[
        Rungs, typer.Option(help="all: add one rewrite per rung; ends: no rewrites and all of them.")
    ] = Rungs.all,
    frames: Frames = None,
    height: Pixels = None,
    width: Pixels = None,
    decode_chunk: Chunk = None,
    dtype: Type = DTypeOption.auto,
    peer_dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of diffusers' module; auto is that of --dtype.")
    ] = DTypeOption.auto,
    device: Device = "auto",
    repeat: Repeat = 5,
    memory: Memory = True,
    out: Out = None,
) -> None:
    """Time the exact rewrites, added one at a time, against diffusers' own module."""
    if (checkpoint is None) == (random_weights is None):
        raise typer.BadParameter("pass either --checkpoint or --random-weights")
    if variant and checkpoint is None:
        raise typer.BadParameter("--variant belongs to --checkpoint")

    from svd_bench.ladder import ladder_tables
    from svd_bench.running import Asked, measure_rungs

    asked = Asked(
        bundle=None,
        checkpoint=f"random:{random_weights.value}" if random_weights else checkpoint,
        variant=variant,
        backends=names(backends),
        peers=["diffusers"],
        stages=names(networks),
        frames=frames,
        height=height,
        width=width,
        decode_chunk=decode_chunk,
        dtype=dtype.value,
        device=device,
        steps=1,
        repeat=repeat,
        memory=memory,
        out=out,
        command=command(),
        peer_dtype=peer_dtype.value,
    )
    results = measure_rungs(asked, rungs.value, progress())
    show(results, [table.text() for table in ladder_tables(results)])


@app.command("gpu-check")
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for gpu-check.json, updated after each stage.")],
    device: Annotated[str, typer.Option(help="GPU to check: auto, cuda or cuda:N.")] = "auto",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run the stages on tiny networks on the CPU, without a GPU.")
    ] = False,
    limit_s: Annotated[float, typer.Option(help="Stop after this many seconds.")] = 540.0,
    only: Annotated[
        str, typer.Option(help="Stages to run after the first, by their names in the summary; default all.")
    ] = "",
) -> None:
    """Check every CUDA path and measure this GPU within minutes, the most valuable stages first.

    Exit with code 1 without a GPU, or if a stage failed.
    """
    if rehearse and device not in ("auto", "cpu"):
        raise typer.BadParameter("--rehearse runs on the CPU: leave --device out")

    from svd_bench.gpu_check import check

    raise SystemExit(check(out, device, limit_s, names(only), command(), rehearse=rehearse))


app.registered_commands += report_cli.app.registered_commands
app.registered_commands += compiled_cli.app.registered_commands
app.registered_commands += quality_cli.app.registered_commands


def names(value: str) -> list[str]:
    """ "a, b" as a list."""
    return [name.strip() for name in value.split(",") if name.strip()]


def command() -> list[str]:
    return ["svd-bench", *sys.argv[1:]]


def progress() -> Callable[[str], None]:
    import time

    started = time.monotonic()
    return lambda line: typer.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True)


def show(results: Results, tables: list[str]) -> None:
    """Tables, warnings, and on the last line the document."""
    for table in tables:
        typer.echo(f"{table}\n")
    for warning in results.warnings:
        typer.echo(f"warning: {warning}")
    typer.echo(results.model_dump_json())


def main() -> None:
    console.run(app, console.OPTIONS | {"backend": "--backends"})


if __name__ == "__main__":
    main()
