"""`svd-engine generate --prompt`: the photograph from words, kept beside the video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.engine import VideoEngine
    from svd_engine.report import PromptReport


def check_prompt(prompt: str, model: str | None, output: Path, written: Sequence[Path | None]) -> Path:
    """Where the picture will be kept: beside `output`, and at none of the paths that are written anyway.

    Raises SettingsError, CheckpointError, OutputError.
    """
    from svd_engine import text_to_image
    from svd_engine.media.video import check_output

    text_to_image.check(prompt, model or text_to_image.DEFAULT_MODEL)
    kept = check_output(output.with_name(f"{output.stem}-photograph.png"))
    if kept.absolute() in {path.absolute() for path in written if path is not None}:
        raise typer.BadParameter(f"the picture of --prompt is kept as {kept}: name that output otherwise")
    return kept


def picture_of_prompt(
    engine: VideoEngine, prompt: str, model: str | None, seed: int, kept: Path
) -> tuple[Image, PromptReport]:
    """Makes and keeps the picture on the device of an engine without loaded networks, and says how."""
    from svd_engine import text_to_image
    from svd_engine.arguments import torch_dtype
    from svd_engine.media.video import write_video

    device, model = engine.choice.device, model or text_to_image.DEFAULT_MODEL
    dtype = torch_dtype("auto", device)
    picture, report = text_to_image.picture_of(prompt, model, seed=seed, device=device, dtype=dtype)
    write_video([picture], kept, fps=1)
    typer.echo(f"wrote {kept}")
    return picture, report
