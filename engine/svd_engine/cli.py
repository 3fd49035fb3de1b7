"""Command `svd-engine`: arguments in, progress and exit codes out.  Holds no tensor arithmetic."""

from __future__ import annotations

from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine import console
from svd_engine.options import DType, Fit, Variant, Version, integer

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.engine import VideoEngine
    from svd_engine.output import VideoOutput

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class Backend(StrEnum):
    auto = "auto"
    tensorrt = "tensorrt"
    onnxruntime = "onnxruntime"
    compiled = "compiled"
    eager = "eager"


@app.callback()
def root(version: Version = False) -> None:
    """Animate photographs with Stable Video Diffusion."""


@app.command()
def generate(
    image: Annotated[Path, typer.Argument(help="Photograph to animate: JPEG, PNG, WebP, ...")],
    output: Annotated[
        list[Path],
        typer.Option(
            "-o",
            "--output",
            help="Where to: .mp4 .webm .gif .webp, .png (contact sheet), or a folder of frames. Repeatable.",
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
        Backend, typer.Option(help="Backend to run on; auto chooses and says why.")
    ] = Backend.auto,
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        DType, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DType.auto,
    variant: Variant = None,
    frames: Annotated[
        int | None, typer.Option(parser=integer, help="Default: the bundle's or checkpoint's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(parser=integer, help="Pixels; default as --frames.")] = None,
    width: Annotated[int | None, typer.Option(parser=integer, help="Pixels; default as --frames.")] = None,
    fit: Annotated[
        Fit, typer.Option(help="A photograph of another aspect is squeezed, cropped, or padded with black.")
    ] = Fit.stretch,
    steps: Annotated[int, typer.Option(parser=integer, help="Denoising steps.")] = 25,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    fps: Annotated[
        int, typer.Option(parser=integer, help="Frames a second, shown and told to the network.")
    ] = 7,
    motion_bucket_id: Annotated[float, typer.Option(help="0 to 1023; more is more motion.")] = 127,
    noise_aug_strength: Annotated[
        float, typer.Option(help="Noise on the photograph; more departs more.")
    ] = 0.02,
    min_guidance_scale: Annotated[
        float | None, typer.Option(help="Of the first frame; default the model's own, for SVD 1.")
    ] = None,
    max_guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Of the last frame; guidance acts if one of the two is above 1. Default the model's own, "
            "for SVD 3."
        ),
    ] = None,
    decode_chunk_size: Annotated[
        int | None, typer.Option(parser=integer, help="Frames decoded at once; fewer take less memory.")
    ] = None,
    swap_networks: Annotated[
        bool,
        typer.Option("--swap-networks", help="Keep one network in memory at a time: less memory, slower."),
    ] = False,
    num_videos: Annotated[
        int, typer.Option(parser=integer, help="Videos; outputs are numbered OUT-0, OUT-1, ...")
    ] = 1,
    without_rewrite: Annotated[
        list[str] | None,
        typer.Option(help="Switch off an exact rewrite of a checkpoint's networks. Repeatable."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a JSON report: settings, backends, times, memory.")
    ] = None,
) -> None:
    """Generate a video of IMAGE with a bundle (--bundle) or a checkpoint (--checkpoint)."""
    if (bundle is None) == (checkpoint is None):
        raise typer.BadParameter("pass either --bundle BUNDLE or --checkpoint CHECKPOINT")
    if bundle is not None and (dtype is not DType.auto or without_rewrite or variant):
        raise typer.BadParameter(
            "--dtype, --variant and --without-rewrite belong to --checkpoint; a bundle has its own"
        )
    if num_videos < 1:
        raise typer.BadParameter("--num-videos must be at least 1")
    if num_videos > 1 and any(path.name in ("", "..") for path in output):
        raise typer.BadParameter("--num-videos numbers the outputs: give each a name")

    from svd_engine.image import load_image
    from svd_engine.settings import Settings, check_seed
    from svd_engine.video import MAX_GIF_FPS, check_output

    check_seed(seed)
    Settings(  # refused before anything is opened, with 1 for what the engine knows
        frames=1 if frames is None else frames,
        height=1 if height is None else height,
        width=1 if width is None else width,
        min_guidance_scale=1 if min_guidance_scale is None else min_guidance_scale,
        max_guidance_scale=1 if max_guidance_scale is None else max_guidance_scale,
        steps=steps, fps=fps, motion_bucket_id=motion_bucket_id, noise_aug_strength=noise_aug_strength,
        decode_chunk_size=decode_chunk_size, videos_per_image=num_videos,
    )  # fmt: skip
    if fps > MAX_GIF_FPS and any(path.suffix.lower() == ".gif" for path in output):
        raise typer.BadParameter(f"a GIF shows at most {MAX_GIF_FPS} frames a second: lower --fps")
    targets = [[check_output(_numbered(path, i, num_videos)) for i in range(num_videos)] for path in output]
    if report is not None:
        console.check_folder(report)
    written = [*chain.from_iterable(targets), *([report] if report else [])]
    if len({path.absolute() for path in written}) < len(written):
        raise typer.BadParameter("two of the outputs have the same name")
    photograph = load_image(image)

    from svd_engine.engine import VideoEngine

    if bundle is not None:
        engine = VideoEngine.from_bundle(
            bundle, backend=backend.value, device=device, swap_networks=swap_networks
        )
    else:
        assert checkpoint is not None
        engine = VideoEngine.from_checkpoint(
            checkpoint, backend=backend.value, device=device, dtype=dtype.value, variant=variant,
            without_rewrites=without_rewrite or (), swap_networks=swap_networks,
        )  # fmt: skip
    typer.echo(f"{engine.choice.backend} on {engine.choice.device} ({engine.choice.reason})", err=True)
    _note_distortion(photograph, height or engine.default.height, width or engine.default.width, fit)
    with engine:
        result = _with_progress(
            engine, steps, seed,
            image=photograph, fit=fit.value, height=height, width=width, num_frames=frames,
            num_inference_steps=steps, min_guidance_scale=min_guidance_scale,
            max_guidance_scale=max_guidance_scale, fps=fps, motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength, decode_chunk_size=decode_chunk_size,
            num_videos_per_prompt=num_videos,
        )  # fmt: skip
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
    from svd_engine.bundle import Bundle

    if checkpoint is not None:
        from svd_engine.checkpoint import open_checkpoint

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
        rows = [*facts.bundle_abilities(opened.manifest.dtype), facts.tensorrt_ability(opened)]
    for row in rows:
        typer.echo(f"{row.backend} on {row.device}: {row.why_not or 'ready'}")


def _note_distortion(photograph: Image, height: int, width: int, fit: Fit) -> None:
    """Say so when the photograph's proportions will not be kept: the default is diffusers'."""
    factor = photograph.width * height / (photograph.height * width)
    if fit is Fit.stretch and not 0.98 < factor < 1.02:
        typer.echo(
            f"the photograph, {photograph.width} x {photograph.height}, is squeezed into {width} x {height}: "
            "--fit crop or --fit pad keeps its proportions",
            err=True,
        )


def _with_progress(engine: VideoEngine, steps: int, seed: int, **call: Any) -> VideoOutput:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    engine.set_progress_bar_config(disable=True)  # this command shows its own
    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=steps)

        def on_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update(task, completed=step + 1)
            return tensors

        generator = torch.Generator("cpu").manual_seed(seed)
        result: VideoOutput = engine(
            generator=generator, output_type="pt", callback_on_step_end=on_step, **call
        )
        return result


def _write(result: VideoOutput, targets: list[list[Path]], fps: int) -> None:
    from svd_engine.video import as_bytes, write_video

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
        typer.echo(f"{name:<16}{value}")


def main() -> None:
    console.run(app)
