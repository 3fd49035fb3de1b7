"""Commands that time subjects in turns: run, ladder, halves.  Arguments in; measures nothing itself."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from svd_bench.commands.arguments import command_line, names, progress, show_results, show_tables
from svd_engine.backends.registry import BACKENDS
from svd_engine.cli.options import DTypeOption, FamilyOption, Variant

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class RungsOption(StrEnum):
    all = "all"
    ends = "ends"


Checkpoint = Annotated[
    str | None,
    typer.Option(help="Checkpoint: svd, svd-xt, svd-xt-1-1, demo, a diffusers folder, a file, or a hub id."),
]
RandomWeights = Annotated[
    FamilyOption | None,
    typer.Option(help="Architecture to measure with seeded random weights, without a checkpoint."),
]
FrameCount = Annotated[
    int | None, typer.Option(help="Number of frames; default the bundle's or checkpoint's own.")
]
Pixels = Annotated[int | None, typer.Option(help="In pixels; default the bundle's or checkpoint's own.")]
Chunk = Annotated[int | None, typer.Option(help="Frames per decoder call; default all.")]
Device = Annotated[str, typer.Option(help="Device to measure: auto, cpu, cuda or cuda:N.")]
Type = Annotated[
    DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
]
WithoutGuidance = Annotated[
    bool,
    typer.Option(
        "--without-guidance",
        help="Measure without guidance, half the work of a step, as few-step models take it.",
    ),
]
Repeat = Annotated[int, typer.Option(min=1, help="Timed calls per subject.")]
Memory = Annotated[bool, typer.Option(help="Measure peak memory of each subject in its own process.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the JSON document, updated after each row.")]


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
    frames: FrameCount = None,
    height: Pixels = None,
    width: Pixels = None,
    decode_chunk: Chunk = None,
    dtype: Type = DTypeOption.auto,
    device: Device = "auto",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the whole video.")] = 25,
    without_guidance: WithoutGuidance = False,
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

    from svd_bench.contest.runs import RunOptions, measure_run
    from svd_bench.report.views import tables_of

    options = RunOptions(
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
        command=command_line(),
        guidance=not without_guidance,
    )
    results = measure_run(options, progress())
    show_results(results, tables_of(results))


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
        RungsOption, typer.Option(help="all: add one rewrite per rung; ends: no rewrites and all of them.")
    ] = RungsOption.all,
    frames: FrameCount = None,
    height: Pixels = None,
    width: Pixels = None,
    decode_chunk: Chunk = None,
    dtype: Type = DTypeOption.auto,
    peer_dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of diffusers' module; auto is that of --dtype.")
    ] = DTypeOption.auto,
    device: Device = "auto",
    without_guidance: WithoutGuidance = False,
    repeat: Repeat = 5,
    memory: Memory = True,
    out: Out = None,
) -> None:
    """Time the exact rewrites, added one at a time, against diffusers' own module."""
    if (checkpoint is None) == (random_weights is None):
        raise typer.BadParameter("pass either --checkpoint or --random-weights")
    if variant and checkpoint is None:
        raise typer.BadParameter("--variant belongs to --checkpoint")

    from svd_bench.contest.runs import RunOptions, measure_rungs
    from svd_bench.report.ladder import ladder_tables

    options = RunOptions(
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
        command=command_line(),
        peer_dtype=peer_dtype.value,
        guidance=not without_guidance,
    )
    results = measure_rungs(options, rungs.value, progress())
    show_results(results, ladder_tables(results))


@app.command()
def halves(
    checkpoint: Annotated[str, typer.Option(help="Checkpoint, as of `run`.")] = "demo",
    backends: Annotated[
        str, typer.Option(help="Backends to measure: eager, onnxruntime.")
    ] = "eager,onnxruntime",
    frames: FrameCount = None,
    height: Pixels = None,
    width: Pixels = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a video.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each half.")] = 1,
    repeat: Repeat = 7,
    markdown: Annotated[bool, typer.Option(help="Table as Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for halves.json.")] = None,
) -> None:
    """Time the two halves of guidance on the CPU: in two threads, in two processes, on one device."""
    import torch

    from svd_bench.contest import halves as measuring
    from svd_bench.documents.recorder import out_folder
    from svd_bench.measuring.environment import environment
    from svd_bench.subjects.cases import checkpoint_of
    from svd_engine.cli import console
    from svd_engine.request import Settings
    from svd_engine.values import one_of

    wanted = [one_of("backend", name, measuring.BACKEND_NAMES) for name in names(backends)]
    if not wanted:
        raise typer.BadParameter("name a backend with --backends")
    model = checkpoint_of(checkpoint).model
    size = Settings(
        model.frames if frames is None else frames,
        model.height if height is None else height,
        model.width if width is None else width,
    )
    size.check_size(model.architecture.size_multiple)
    video = measuring.Video(size.frames, size.height, size.width, steps)
    folder = None if out is None else out_folder(out)
    say = progress()
    rows = [
        row
        for name in wanted
        for row in measuring.measure_halves(checkpoint, name, video, threads, repeat, say)
    ]
    document = measuring.HalvesDocument(
        environment=environment(torch.device("cpu"), None, command_line()),
        model=model.name, steps=steps, threads=threads, rows=tuple(rows),
    )  # fmt: skip
    show_tables([measuring.halves_table(document)], markdown)
    typer.echo(document.model_dump_json())
    if folder is not None:
        console.write_text(folder / "halves.json", document.model_dump_json(indent=1) + "\n")
