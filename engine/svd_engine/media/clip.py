"""Videos in: the frames of a video file, an animation or a folder of pictures, as `video` writes them.

Letters in shapes: F frames, H W pixels.  A file is read by the reader of its suffix alone, whatever is in it:
FFmpeg would follow what a playlist names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence

from svd_engine.errors import ImageError
from svd_engine.media.image import MAX_PIXELS, load_image
from svd_engine.values import as_path

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".webm": "webm", ".mkv": "matroska"}  # FFmpeg's demuxers
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}  # Pillow's formats
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of a folder
MAX_CLIP_PIXELS = 2**28  # of all frames: 3 GiB as float32


@dataclass(frozen=True)
class Clip:
    frames: np.ndarray  # bytes [F, H, W, 3]
    fps: float | None  # frames a second; None for a folder, which does not say


def read_video(path: str | Path) -> Clip:
    """Read a video: .mp4 .mov .webm .mkv, .gif .webp, or a folder of pictures in the order of their names.

    Of pictures in a folder all must have one size.  A frame that a GIF or WebP shows for longer than others
    counts as several.  Raises ImageError for what cannot be read, has fewer than two frames, or more than
    MAX_CLIP_PIXELS, and SettingsError for what is no path.
    """
    path, name = as_path("clip", path), f"clip {path}"
    suffix = path.suffix.lower()
    if path.is_dir():
        clip = Clip(_stacked(_pictures(path, name), name), None)
    elif not path.is_file():
        raise ImageError(
            name,
            expected="a video file, or a folder of frames",
            got="a device" if path.exists() else "nothing at that path",
            remedy="Give the path of a video.",
        )
    elif suffix in CONTAINERS:
        clip = _decoded(path, CONTAINERS[suffix], name)
    elif suffix in ANIMATIONS:
        clip = _animation(path, ANIMATIONS[suffix], name)
    else:
        raise ImageError(
            name,
            expected=f"a suffix out of {', '.join((*CONTAINERS, *ANIMATIONS))}, or a folder of frames",
            got=f"the suffix {suffix}" if suffix else "none",
            remedy="Convert it, or write its frames into a folder as pictures.",
        )
    if len(clip.frames) < 2:
        raise ImageError(
            name, expected="two frames or more", got="one", remedy="Pass a single picture as the image."
        )
    return clip


def _pictures(folder: Path, name: str) -> Iterator[np.ndarray]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise ImageError(
            name,
            expected=f"pictures in that folder ({', '.join(PICTURES)})",
            got="none",
            remedy="Give the path of a folder of frames, or of a video file.",
        )
    return (np.asarray(load_image(file)) for file in files)


def _decoded(path: Path, demuxer: str, name: str) -> Clip:
    import av

    def frames(container: av.container.InputContainer) -> Iterator[np.ndarray]:
        for frame in container.decode(video=0):
            yield frame.reformat(format="rgb24", dst_color_range="JPEG").to_ndarray()  # by the file's matrix

    try:
        with open(path, "rb") as file, av.open(file, "r", format=demuxer) as container:
            rate = container.streams.video[0].average_rate
            return Clip(_stacked(frames(container), name), float(rate) if rate else None)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _damaged(name, error) from error


def _animation(path: Path, kind: str, name: str) -> Clip:
    try:
        with Image.open(path, formats=[kind]) as image:
            durations: list[float] = []

            def frames() -> Iterator[np.ndarray]:
                for frame in ImageSequence.Iterator(image):
                    yield np.asarray(frame.convert("RGB"))
                    durations.append(frame.info.get("duration", 0))

            stacked = _stacked(frames(), name)
    except ImageError:
        raise
    except Exception as error:  # a decoder that meets damage raises whatever its parser stumbled over
        raise _damaged(name, error) from error
    shortest = min(durations)
    if shortest <= 0:
        return Clip(stacked, None)
    times = [int(duration / shortest) for duration in durations]
    return Clip(np.repeat(stacked, times, axis=0), 1000 * sum(times) / sum(durations))


def _stacked(frames: Iterable[np.ndarray], name: str) -> np.ndarray:
    """Frames of one size; raises ImageError before there are too many."""
    kept: list[np.ndarray] = []
    for frame in frames:
        size = frame.shape[0] * frame.shape[1]
        if size > MAX_PIXELS or size * (len(kept) + 1) > MAX_CLIP_PIXELS:
            raise ImageError(
                name,
                expected=f"at most {MAX_CLIP_PIXELS:,} pixels in all frames, and {MAX_PIXELS:,} in one",
                got=f"more, in {len(kept) + 1} frames of {frame.shape[1]} x {frame.shape[0]}",
                remedy="Continue its last second alone, and join the two videos afterwards.",
            )
        if kept and frame.shape != kept[0].shape:
            height, width = kept[0].shape[:2]
            raise ImageError(
                name,
                expected=f"frames of one size, {width} x {height} as the first",
                got=f"{frame.shape[1]} x {frame.shape[0]} in frame {len(kept)}",
                remedy="Resize the frames first.",
            )
        kept.append(frame)
    return np.stack(kept)


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(
        name,
        expected="a whole video in the format of its suffix",
        got=f"{type(error).__name__}: {error}",
        remedy="Copy the file again, or convert it to MP4.",
    )
