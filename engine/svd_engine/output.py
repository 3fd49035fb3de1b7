"""The result of a call: its frames in the requested type, the report, and saving to files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from svd_engine.errors import SettingsError
from svd_engine.media import video
from svd_engine.report import RunReport
from svd_engine.values import as_path

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# of every video, by `output_type`: "pil", "np" [N,F,H,W,3], "pt" [N,F,3,H,W] or "latent" [N,F,4,h,w]
VideoFrames: TypeAlias = "list[list[Image]] | np.ndarray | Tensor"


@dataclass(frozen=True)
class VideoOutput:
    """The frames of every video, as diffusers returns them, and the report of the call.

    `output.frames`, `output[0]` and `output["frames"]` are the same.
    """

    frames: VideoFrames
    report: RunReport

    def __getitem__(self, key: int | str) -> VideoFrames:
        if isinstance(key, str):
            return {"frames": self.frames}[key]
        return (self.frames,)[key]

    def save(self, path: str | Path, fps: int | None = None) -> list[Path]:
        """Write every video to `path`; several are numbered NAME-0.mp4, NAME-1.mp4, ...  Return the paths.

        The suffix decides: .mp4 .webm .gif .webp, .png (contact sheet), or none for a folder of frames.
        fps: frames a second; left out, those of the call.  Checks every path before it writes one.
        Raises SettingsError for latents and for what the format cannot hold, OutputError if a path cannot be
        written.
        """
        path, count = as_path("output", path), len(self.frames)
        paths = [
            path if count == 1 else path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)
        ]
        for one in paths:
            video.check_output(one)
        pixels = [self._bytes(index) for index in range(count)]
        rate = self.report.settings.fps if fps is None else fps
        return [video.write_video(frames, one, rate) for frames, one in zip(pixels, paths, strict=True)]

    def _bytes(self, index: int) -> np.ndarray:
        frames = self.frames[index]
        if isinstance(frames, Tensor) and frames.shape[1] != 3:
            raise SettingsError(
                "frames to save",
                expected='pictures: output_type "pil", "np" or "pt"',
                got=f"latents {[len(self.frames), *frames.shape]}",
                remedy="Leave output_type out of the call.",
            )
        return video.as_bytes(frames)


def present(result: Tensor, output_type: str) -> VideoFrames:
    """Convert frames [N,F,3,H,W] in [0, 1], or latents, to `output_type`."""
    if output_type in ("pt", "latent"):
        return result
    if output_type == "np":
        return result.permute(0, 1, 3, 4, 2).cpu().numpy()
    from PIL.Image import fromarray

    return [[fromarray(frame) for frame in video.to_uint8(one)] for one in result]
