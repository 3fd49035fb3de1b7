"""Command `svd-engine`: arguments in, progress and exit codes out.  Holds no tensor arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svd_engine.cli import console
from svd_engine.cli.batch import batch
from svd_engine.cli.call_options import call_options, given_options
from svd_engine.cli.engine_options import EngineOptions, engine_options
from svd_engine.cli.info import info
from svd_engine.cli.options import DevicesOption, VersionFlag, devices_of
from svd_engine.cli.plan import plan
from svd_engine.cli.prompt import check_prompt, picture_of_prompt
from svd_engine.cli.serve import serve
from svd_engine.install import install_line

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.engine import VideoEngine
    from svd_engine.output import VideoOutput
    from svd_engine.report import PromptReport

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)
app.command()(serve)


@app.callback()
def root(version: VersionFlag = False) -> None:
    """Animate photographs with Stable Video Diffusion."""


@app.command()
@engine_options
@call_options
def generate(
    context: typer.Context,
    output: Annotated[
        list[Path],
        typer.Option(
            "-o",
            "--output",
            help="Where to: .mp4 .webm .gif .webp, .png (contact sheet), or a folder of frames. Repeatable. "
            "Several videos are numbered OUT-0, OUT-1, ...",
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Argument(
            help="Photograph to animate: JPEG, PNG, WebP, ... SV3D centres what is not transparent on white, "
            "and takes a picture without transparency as it is.",
            show_default=False,
        ),
    ] = None,
    continue_from: Annotated[
        Path | None,
        typer.Option(
            metavar="VIDEO",
            help="In place of IMAGE: write VIDEO (.mp4 .mov .webm .mkv .gif .webp, or a folder of frames) "
            "and new frames that go on from its last one. Only that frame is known to the networks: expect "
            "motion to change at the seam, which is measured, and softer pictures with every continuation.",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="In place of IMAGE: words, of which a text-to-image model makes the photograph. It is kept "
            "beside the first output, as OUT-photograph.png."
        ),
    ] = None,
    text_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FOLDER",
            help="With --prompt: the text-to-image pipeline of diffusers, from the hub or a folder; default "
            "stabilityai/stable-diffusion-xl-base-1.0.",
        ),
    ] = None,
    *,
    opened: EngineOptions,
    devices: DevicesOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a JSON report: settings, backends, times, memory.")
    ] = None,
    **call: Any,
) -> None:
    """Generate a video of IMAGE, or of words, with a bundle (--bundle) or a checkpoint (--checkpoint)."""
    if sum(given is not None for given in (image, continue_from, prompt)) != 1:
        raise typer.BadParameter("pass one of IMAGE, --continue-from VIDEO and --prompt WORDS")
    if text_model is not None and prompt is None:
        raise typer.BadParameter("--text-model belongs to --prompt")
    opened.check()

    from svd_engine.media.clip import read_video
    from svd_engine.media.image import load_image
    from svd_engine.request import check

    console.show_notices()
    check(call)  # before anything is opened
    chosen = given_options(context, call)
    if {"sigmas", "num_inference_steps"} <= chosen:
        raise typer.BadParameter("pass either --steps or --sigmas")
    if continue_from is not None and "fit" in chosen:
        raise typer.BadParameter(
            "--fit does nothing with --continue-from, whose frames have the video's size"
        )
    opening = opened.opening(call["num_frames"], devices=devices_of(devices))
    seed, fps, videos = call.pop("seed"), call["fps"], call["num_videos_per_prompt"]
    targets = _targets(output, videos, fps, report, image or continue_from)
    of_words: PromptReport | None = None
    if prompt is not None:
        kept = check_prompt(prompt, text_model, output[0], [*chain.from_iterable(targets), report])
    photograph = load_image(image, transparency=True) if image is not None else None
    clip = read_video(continue_from) if continue_from is not None else None
    if clip is not None:
        _note_rate(clip.fps, fps)

    from svd_engine.continuing import continue_video

    engine = opening.open()
    typer.echo(f"{engine.choice.backend} on {engine.choice.device} ({engine.choice.reason})", err=True)
    call = opened.with_preset(call, chosen, engine.model)
    check(call)
    if prompt is not None:
        photograph, of_words = picture_of_prompt(engine, prompt, text_model, seed, kept)
    if photograph is not None:
        size = call["height"] or engine.default.height, call["width"] or engine.default.width
        if not (engine.model.orbits and photograph.has_transparency_data):  # which is centred on a square
            _note_distortion(photograph, *size, call["fit"])
        generated = partial(engine, image=photograph)
    else:
        assert clip is not None
        del call["fit"]
        generated = partial(continue_video, engine, clip.frames)
    with engine:
        result = _with_progress(engine, seed, generated, call)
    _write(result, targets, fps)
    if report is not None:
        run = result.report.model_copy(update={"prompt": of_words})
        console.write_text(report, run.model_dump_json(indent=1) + "\n")
    _summary(result, targets)


app.command()(batch)
app.command()(info)
app.command()(plan)


def _targets(
    output: list[Path], videos: int, fps: int, report: Path | None, source: Path | None
) -> list[list[Path]]:
    """Where each video goes, by output.  Raises OutputError and usage errors for what cannot be written.

    source: the photograph or the clip, in whose place nothing is written.
    """
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
    there = [path for path in written if path.exists()]
    if source is not None and source.exists() and any(path.samefile(source) for path in there):
        raise typer.BadParameter(f"{source} is what the video is made from: give the output another name")
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


def _note_rate(own: float | None, fps: int) -> None:
    """Say so when a clip will not play at its own speed."""
    if own is not None and abs(own / fps - 1) > 0.02:
        typer.echo(
            f"the clip plays at {own:.3g} frames a second, the video will at {fps}: --fps sets it", err=True
        )


def _with_progress(
    engine: VideoEngine, seed: int, generated: Callable[..., VideoOutput], call: dict[str, Any]
) -> VideoOutput:
    """`generated` is the engine's call, or one that makes it, without the arguments in `call`."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from svd_engine.observer import Observer

    engine.set_progress_bar_config(disable=True)  # this command shows its own
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("denoising", total=None)

        class Shown(Observer):
            def on_network_run(self, network: str) -> None:
                if network in ("denoiser", "shallow_denoiser"):
                    bar.update(task, description=f"denoising{', shallow' * (network != 'denoiser')}")

            def on_evaluation(self, done: int, evaluations: int) -> None:
                bar.update(task, completed=done, total=evaluations)

            def on_stage_begin(self, stage: str) -> None:
                if stage == "vae_decoder":
                    self.decoding = bar.add_task("decoding", total=None)

            def on_decoding(self, done: float, frames: int) -> None:
                bar.update(self.decoding, completed=int(done), total=frames)

        generator = torch.Generator("cpu").manual_seed(seed)
        return generated(generator=generator, output_type="pt", observer=Shown(), **call)


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
    if run.reuse is not None:
        count, of = len(run.shallow_evaluations), len(run.evaluation_ms)
        typer.echo(f"reuse: {count} of {of} evaluations ran the shallow denoiser only, which is lossy")
    for seam in run.seams:
        flow = (
            f"flow {seam.flow:.2f} pixels, {seam.median_flow:.2f} between the clip's frames"
            if seam.flow is not None
            else f"flow not measured, which needs OpenCV ({install_line('bench')})"
        )
        typer.echo(f"seam: PSNR {seam.psnr:.1f} dB, {seam.median_psnr:.1f} between the clip's frames; {flow}")
    for path in chain.from_iterable(targets):
        typer.echo(f"wrote {path}")


def _numbered(path: Path, index: int, of: int) -> Path:
    return path if of == 1 else path.with_name(f"{path.stem}-{index}{path.suffix}")


def main() -> None:
    console.run(app)
