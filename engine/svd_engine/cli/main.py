"""Command `svd-engine`: arguments in, progress and exit codes out.  Holds no tensor arithmetic."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine.backends.registry import NAMES, check_name
from svd_engine.cli import console
from svd_engine.cli.call_options import call_options, given_options
from svd_engine.cli.options import (
    DecodingOption,
    DTypeOption,
    MemoryOption,
    PresetOption,
    Variant,
    VersionFlag,
    integer,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.engine import VideoEngine
    from svd_engine.output import VideoOutput

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root(version: VersionFlag = False) -> None:
    """Animate photographs with Stable Video Diffusion."""


@app.command()
@call_options
def generate(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="Photograph to animate: JPEG, PNG, WebP, ...")],
    output: Annotated[
        list[Path],
        typer.Option(
            "-o",
            "--output",
            help="Where to: .mp4 .webm .gif .webp, .png (contact sheet), or a folder of frames. Repeatable. "
            "Several videos are numbered OUT-0, OUT-1, ...",
        ),
    ],
    bundle: Annotated[Path | None, typer.Option(help="Bundle to run, exported by svd-export onnx.")] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to run: svd, svd-xt, svd-xt-1-1, demo, a diffusers folder, or a hub id."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(metavar=f"[{'|'.join(NAMES)}]", help="Backend to run on; auto chooses and says why."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DTypeOption.auto,
    variant: Variant = None,
    swap_networks: Annotated[
        bool,
        typer.Option("--swap-networks", help="Keep one network in memory at a time: less memory, slower."),
    ] = False,
    memory: MemoryOption = None,
    jit_cache: Annotated[
        Path | None,
        typer.Option(help="Keep the kernels that tensorrt-rtx compiles here; default your cache folder."),
    ] = None,
    no_jit_cache: Annotated[
        bool, typer.Option("--no-jit-cache", help="Keep no kernels that tensorrt-rtx compiles.")
    ] = False,
    without_rewrite: Annotated[
        list[str] | None,
        typer.Option(help="Switch off an exact rewrite of a checkpoint's networks. Repeatable."),
    ] = None,
    preset: Annotated[
        PresetOption | None,
        typer.Option(
            help="Take steps and guidance scales that others recommend, where no option says otherwise: "
            "sgm is Stability's own scripts (SVD 25 steps, 1 to 2.5; SVD-XT 30 steps, 1.5 to 3)."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a JSON report: settings, backends, times, memory.")
    ] = None,
    **call: Any,
) -> None:
    """Generate a video of IMAGE with a bundle (--bundle) or a checkpoint (--checkpoint)."""
    if (bundle is None) == (checkpoint is None):
        raise typer.BadParameter("pass either --bundle BUNDLE or --checkpoint CHECKPOINT")
    if bundle is not None and (dtype is not DTypeOption.auto or without_rewrite or variant):
        raise typer.BadParameter(
            "--dtype, --variant and --without-rewrite belong to --checkpoint; a bundle has its own"
        )
    if jit_cache is not None and no_jit_cache:
        raise typer.BadParameter("pass either --jit-cache DIR or --no-jit-cache")
    compiles = bundle is not None and backend in ("auto", "tensorrt-rtx")
    if (jit_cache is not None or no_jit_cache) and not compiles:
        raise typer.BadParameter("--jit-cache and --no-jit-cache belong to --backend tensorrt-rtx")

    from svd_engine.media.image import load_image
    from svd_engine.request import check

    check_name(backend)
    console.show_notices()
    check(call)  # before anything is opened
    chosen = given_options(context, call)
    seed, fps, videos = call.pop("seed"), call["fps"], call["num_videos_per_prompt"]
    targets = _targets(output, videos, fps, report)
    photograph = load_image(image)

    from svd_engine.engine import VideoEngine

    if bundle is not None:
        engine = VideoEngine.from_bundle(
            bundle, backend=backend, device=device, swap_networks=swap_networks,
            jit_cache=None if no_jit_cache else jit_cache or "auto", memory=memory,
        )  # fmt: skip
    else:
        assert checkpoint is not None
        engine = VideoEngine.from_checkpoint(
            checkpoint, backend=backend, device=device, dtype=dtype.value, variant=variant,
            without_rewrites=without_rewrite or (), swap_networks=swap_networks, memory=memory,
        )  # fmt: skip
    typer.echo(f"{engine.choice.backend} on {engine.choice.device} ({engine.choice.reason})", err=True)
    if preset is not None:
        recommended = engine.preset(preset.value)
        call |= {name: value for name, value in recommended.items() if name not in chosen}
        check(call)
    size = call["height"] or engine.default.height, call["width"] or engine.default.width
    _note_distortion(photograph, *size, call["fit"])
    with engine:
        result = _with_progress(engine, seed, image=photograph, **call)
    _write(result, targets, fps)
    if report is not None:
        console.write_text(report, result.report.model_dump_json(indent=1) + "\n")
    _summary(result, targets)


@app.command()
def info(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle to describe; without one, describe this machine.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint to describe, and the weight files that it reads.")
    ] = None,
    variant: Variant = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the hash of every file of the bundle first.")
    ] = False,
) -> None:
    """Describe a bundle, a checkpoint or this machine, and say which backends are ready here."""
    if bundle is not None and checkpoint is not None:
        raise typer.BadParameter("pass BUNDLE or --checkpoint, not both")
    if variant and checkpoint is None:
        raise typer.BadParameter("--variant belongs to --checkpoint")
    if check and bundle is None:
        raise typer.BadParameter("--check needs a BUNDLE, whose files it hashes")

    from svd_engine import info as facts
    from svd_engine.bundle.reading import Bundle

    if checkpoint is not None:
        from svd_engine.checkpoint.opening import open_checkpoint

        _lines(facts.checkpoint_facts(open_checkpoint(checkpoint, variant)))
        rows = facts.torch_abilities()
    elif bundle is None:
        _lines(facts.machine_facts())
        rows = facts.abilities()
    else:
        opened = Bundle(bundle)
        if check:
            opened.check_hashes()
            _lines({"checked": f"{len(opened.manifest.files)} files have the manifest's hashes"})
        _lines(facts.bundle_facts(opened) | facts.plan_facts(opened))
        rows = [*facts.bundle_abilities(opened.manifest.precision), *facts.plan_abilities(opened)]
    for row in rows:
        typer.echo(f"{row.backend} on {row.device}: {row.why_not or 'ready'}")


@app.command()
def plan(
    source: Annotated[str, typer.Argument(help="Bundle's folder, or checkpoint as generate takes it.")],
    memory: Annotated[
        str, typer.Option(help="Memory budget: 8GiB, 0.9 (of all), auto (what is free).")
    ] = "auto",
    backend: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(NAMES)}]", help="Backend to plan for; auto is the usual one.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Device to plan for: auto, cpu or cuda, which need not be here.")
    ] = "auto",
    dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DTypeOption.auto,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", parser=integer)] = None,
    height: Annotated[int | None, typer.Option(help="Height of the video (pixels).", parser=integer)] = None,
    width: Annotated[int | None, typer.Option(help="Width of the video (pixels).", parser=integer)] = None,
    decoding: Annotated[
        DecodingOption, typer.Option(help="Decoding to plan for, as of generate.")
    ] = DecodingOption.auto,
    decode_chunk_size: Annotated[
        int | None, typer.Option(help="Frames decoded at once.", parser=integer)
    ] = None,
    num_videos: Annotated[int, typer.Option(help="Videos of each photograph.", parser=integer)] = 1,
    swap_networks: Annotated[
        bool, typer.Option("--swap-networks", help="Keep one network in memory at a time.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Show every plan that was considered.")] = False,
) -> None:
    """Show how a video of SOURCE would be made within a memory budget; reads no weights and runs nothing."""
    from svd_engine import planned

    call = {
        "frames": frames, "height": height, "width": width, "decoding": decoding.value,
        "decode_chunk_size": decode_chunk_size, "videos_per_image": num_videos,
    }  # fmt: skip
    asked = {name: value for name, value in call.items() if value is not None}
    planner, settings = planned.planner_of(source, memory, backend, device, dtype.value, swap_networks, asked)
    if every:
        typer.echo(planned.comparison(planner, planner.considered(settings, num_videos)))
    typer.echo(planned.table(planner, planner.choose(settings, num_videos)))


def _targets(output: list[Path], videos: int, fps: int, report: Path | None) -> list[list[Path]]:
    """Where each video goes, by output.  Raises OutputError and usage errors for what cannot be written."""
    from svd_engine.media.video import MAX_GIF_FPS, check_output

    if videos > 1 and any(path.name in ("", "..") for path in output):
        raise typer.BadParameter("--num-videos numbers the outputs: give each a name")
    if fps > MAX_GIF_FPS and any(path.suffix.lower() == ".gif" for path in output):
        raise typer.BadParameter(f"a GIF shows at most {MAX_GIF_FPS} frames a second: lower --fps")
    targets = [[check_output(_numbered(path, i, videos)) for i in range(videos)] for path in output]
    if report is not None:
        console.check_folder(report)
    written = [*chain.from_iterable(targets), *([report] if report else [])]
    if len({path.absolute() for path in written}) < len(written):
        raise typer.BadParameter("two of the outputs have the same name")
    return targets


def _note_distortion(photograph: Image, height: int, width: int, fit: str) -> None:
    """Say so when the photograph's proportions will not be kept: the default is diffusers'."""
    factor = photograph.width * height / (photograph.height * width)
    if fit == "stretch" and not 0.98 < factor < 1.02:
        typer.echo(
            f"the photograph, {photograph.width} x {photograph.height}, is squeezed into {width} x {height}: "
            "--fit crop or --fit pad keeps its proportions",
            err=True,
        )


def _with_progress(engine: VideoEngine, seed: int, **call: Any) -> VideoOutput:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from svd_engine.observer import Observer

    engine.set_progress_bar_config(disable=True)  # this command shows its own
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("evaluations", total=None)

        class Shown(Observer):
            def on_evaluation(self, done: int, evaluations: int) -> None:
                bar.update(task, completed=done, total=evaluations)

        generator = torch.Generator("cpu").manual_seed(seed)
        result: VideoOutput = engine(generator=generator, output_type="pt", observer=Shown(), **call)
        return result


def _write(result: VideoOutput, targets: list[list[Path]], fps: int) -> None:
    from svd_engine.media.video import as_bytes, write_video

    for index, frames in enumerate(result.frames):
        pixels = as_bytes(frames)
        for numbered in targets:
            write_video(pixels, numbered[index], fps)


def _summary(result: VideoOutput, targets: list[list[Path]]) -> None:
    run = result.report
    if run.random_weights:
        typer.echo("random weights: the shapes and the work are real, the picture means nothing")
    for stage, ms in run.stage_ms.items():
        where = run.stages.get(stage)
        place = f"{where.backend} {where.device} {where.dtype}" if where else ""
        typer.echo(f"{stage:<14}{ms:>10.0f} ms  {place}")
    typer.echo(f"{'total':<14}{run.total_ms:>10.0f} ms")
    for path in chain.from_iterable(targets):
        typer.echo(f"wrote {path}")


def _numbered(path: Path, index: int, of: int) -> Path:
    return path if of == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def _lines(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        typer.echo(f"{name:<14}  {value}")


def main() -> None:
    console.run(app)
