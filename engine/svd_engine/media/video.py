"""Pixels out: from the decoder's frames to a video file, an animation, a contact sheet or a folder.

Knows file formats, value ranges and how not to leave half a file.  Must not know networks or GPUs.

Letters in shapes: F frames, H W pixels.  Everything is written into a hidden folder beside the target and
renamed when whole: after any failure or Ctrl-C the target is as it was before, and nothing else is left.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import Image

from svd_engine.errors import OutputError, SettingsError
from svd_engine.shell import make_folder
from svd_engine.values import as_path, at_least

if TYPE_CHECKING:
    import torch

ENCODERS = {".mp4": "libx264", ".webm": "libvpx-vp9"}
ENCODER_THREADS = 1  # the bytes of a video depend on their number, in x264 even from run to run
BT709 = 1  # matrix, primaries and transfer characteristics in ITU-T H.273
LIMITED_RANGE = 1  # FFmpeg's AVCOL_RANGE_MPEG: black is 16, white 235
MAX_GIF_FPS = 50  # a GIF counts in 1/100 s, and players slow down what lasts less than two of them
SHEET_GAP = 4  # pixels between the frames of a contact sheet


# of one video, as `as_bytes` takes them, or of several of which there is one
WritableFrames: TypeAlias = (
    "Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | np.ndarray | torch.Tensor"
)


def as_bytes(frames: WritableFrames) -> np.ndarray:
    """Convert one video to bytes [F, H, W, 3], rounded like diffusers' numpy_to_pil.

    Takes a list of PIL images of one size, an array [F, H, W, 3] of bytes or of floats in [0, 1], or a tensor
    [F, 3, H, W] of floats in [0, 1]; also `result.frames` with one video in it.
    Raises SettingsError for another type, shape or range; NaN is out of range.
    """
    video: Any = frames  # callers pass anything
    batched = isinstance(video, (list, tuple)) and video and not isinstance(video[0], Image.Image)
    if (batched or getattr(video, "ndim", 4) == 5) and len(video) == 1:
        video = video[0]
    if hasattr(video, "detach"):
        return to_uint8(video)
    if isinstance(video, (list, tuple)):
        return _of_images(video)
    if not isinstance(video, np.ndarray):
        raise _no_frames(type(video).__name__)
    if video.ndim != 4 or video.shape[3] != 3 or not video.size or video.dtype.kind not in "uf":
        raise _no_frames(f"{video.dtype} {list(video.shape)}")
    if video.dtype == np.uint8:
        return video
    _check_unit_range(float(video.min()), float(video.max()))
    return (video * 255).round().astype(np.uint8)


def _of_images(images: Sequence[object]) -> np.ndarray:
    pictures = [image for image in images if isinstance(image, Image.Image)]
    if not images or len(pictures) < len(images):
        raise _no_frames(", ".join(sorted({type(image).__name__ for image in images})) or "an empty list")
    if len({picture.size for picture in pictures}) > 1:
        raise _no_frames("images of several sizes")
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Convert frames [F, 3, H, W] in [0, 1] to bytes [F, H, W, 3], rounded like diffusers' numpy_to_pil.

    Raises SettingsError for another shape or range; NaN is out of range.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or not frames.numel():
        raise SettingsError(
            "frames",
            expected="the shape [F, 3, H, W], nothing empty",
            got=f"{list(frames.shape)}",
            remedy="Pass the frames of one video, channels before height and width.",
        )
    frames = frames.detach().float()
    low, high = frames.aminmax()
    _check_unit_range(float(low), float(high))
    return (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_unit_range(low: float, high: float) -> None:
    if not (low >= 0 and high <= 1):  # NaN too
        raise SettingsError(
            "frames",
            expected="values in [0, 1]",
            got=f"values from {low:.9g} to {high:.9g}",
            remedy="Map the decoder's output with (x / 2 + 0.5).clamp(0, 1).",
        )


def _no_frames(got: str) -> SettingsError:
    return SettingsError(
        "frames",
        expected="one video: PIL images of one size, an array [F, H, W, 3] of uint8 or of floats in [0, 1], "
        "or a tensor [F, 3, H, W] of floats",
        got=got,
        remedy='Pass result.frames[0], made with output_type "pil", "np" or "pt".',
    )


def check_output(path: str | Path) -> Path:
    """Say before the work starts whether `write_video` can write to `path`.  Creates nothing.

    The suffix decides: .mp4 (H.264), .webm (VP9), .gif, .webp (animated), .png (all frames on one sheet); a
    path without a suffix, or one that ends in a slash, is a folder of frames.  Raises SettingsError for
    another suffix and for what is no path, and OutputError if the parent folder is missing or not writable,
    the target is a folder where a file is asked for, or the folder of frames exists and is not empty.
    """
    target, what = as_path("output", path), f"output {path}"
    suffix = target.suffix.lower()
    folder = str(path).endswith(("/", os.sep))
    if suffix not in WRITERS or (suffix and folder):
        raise SettingsError(
            what,
            expected=f"a suffix out of {', '.join(filter(None, WRITERS))}, or none for a folder of frames",
            got=f"{'a folder with ' if folder else ''}the suffix {suffix}",
            remedy="Rename it.",
        )
    if suffix in ENCODERS:
        import av

        if ENCODERS[suffix] not in av.codecs_available:
            raise OutputError(
                what,
                expected=f"the encoder {ENCODERS[suffix]} in PyAV",
                got=f"PyAV {av.__version__} built without it",
                remedy="Install PyAV's own wheel (`pip install --force-reinstall av`), or write a .webp.",
            )
    if not target.parent.is_dir():
        raise OutputError(
            what,
            expected=f"the folder {target.parent}",
            got="a file" if target.parent.exists() else "no such folder",
            remedy=f"Create it ({make_folder(target.parent)}), or write elsewhere.",
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(
            what,
            expected=f"a writable folder {target.parent}",
            got="no permission to write there",
            remedy="Change its permissions, or write elsewhere.",
        )
    if suffix and target.is_dir():
        raise OutputError(
            what,
            expected="a file, or nothing yet",
            got="a folder of that name",
            remedy="Choose another name.",
        )
    if not suffix and target.exists():
        empty = target.is_dir() and os.access(target, os.R_OK) and not any(target.iterdir())
        if not empty:
            raise OutputError(
                what,
                expected="an empty folder, or nothing yet",
                got="a folder that is not empty" if target.is_dir() else "a file of that name",
                remedy="Choose another name.",
            )
    return target


def write_video(frames: WritableFrames, path: str | Path, fps: int) -> Path:
    """Write one video, `result.frames[0]` of any output type, to `path`.  Return the path.

    fps: frames a second.  `as_bytes` lists the frames that it takes, `check_output` the formats.  An existing
    file is replaced.  The same frames give the same bytes with the same versions of PyAV and Pillow.  A GIF
    or WebP merges equal neighbours into one longer frame.
    Raises what `check_output` raises, SettingsError for frames or fps that the format cannot hold, and
    OutputError if writing fails.
    """
    target = check_output(path)
    suffix = target.suffix.lower()
    pixels, fps = as_bytes(frames), at_least("fps", fps, 1)
    _check_size(pixels, suffix)
    if suffix == ".gif" and fps > MAX_GIF_FPS:
        raise SettingsError(
            "fps",
            expected=f"a whole number from 1 to {MAX_GIF_FPS} for a GIF",
            got=f"{fps}",
            remedy="Write a .webp, or lower it.",
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".svd-engine-", dir=target.parent) as scratch:
            whole = Path(scratch, f"video{suffix}")
            WRITERS[suffix](pixels, whole, fps)
            whole.replace(target)
    except OSError as error:
        raise OutputError(
            f"output {path}",
            expected=f"to write {len(pixels)} frames",
            got=f"{error.strerror or error}",
            remedy="Nothing was written. Make room there, write elsewhere, or choose another suffix.",
        ) from error
    return target


def _check_size(frames: np.ndarray, suffix: str) -> None:
    if suffix in ENCODERS and (frames.shape[1] % 2 or frames.shape[2] % 2):
        raise SettingsError(
            "frames",
            expected=f"an even height and width for {suffix} (yuv420p halves the colours)",
            got=f"{frames.shape[1]} x {frames.shape[2]}",
            remedy="Crop a row or a column, or write a .webp.",
        )


def _write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    settings = {"crf": "17", "x264-params": "mbtree=0"}  # mbtree gives other bytes from run to run
    _encode(frames, path, fps, settings=settings, container={"movflags": "+faststart"})


def _write_webm(frames: np.ndarray, path: Path, fps: int) -> None:
    settings = {"crf": "20", "b": "0", "cpu-used": "2"}
    _encode(frames, path, fps, settings=settings, container={"fflags": "+bitexact"})  # no random track number


def _encode(
    frames: np.ndarray, path: Path, fps: int, *, settings: dict[str, str], container: dict[str, str]
) -> None:
    """yuv420p in BT.709, limited range, and marked as such: players guess differently at unmarked video."""
    import av

    encoder = ENCODERS[path.suffix]
    try:
        with av.open(str(path), "w", options=container) as file:
            stream = cast("av.VideoStream", file.add_stream(encoder, rate=fps, options=settings))
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            context = stream.codec_context
            context.thread_count, context.color_range = ENCODER_THREADS, LIMITED_RANGE
            context.colorspace = context.color_primaries = context.color_trc = BT709
            for index, pixels in enumerate(frames):
                rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame = rgb.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                frame.pts = index  # in 1 / fps seconds
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    except av.FFmpegError as error:
        raise OSError(error.errno, f"{encoder}: {error.strerror}") from error


def _write_gif(frames: np.ndarray, path: Path, fps: int) -> None:
    """One palette of 256 colours for all frames, so that still parts do not flicker."""
    count, _, width, _ = frames.shape
    sample = Image.fromarray(frames[:, ::4, ::4].reshape(-1, math.ceil(width / 4), 3))
    palette = sample.quantize(256)
    images = [Image.fromarray(frame).quantize(palette=palette) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=_durations(count, fps, 10), loop=0)


def _write_webp(frames: np.ndarray, path: Path, fps: int) -> None:
    images = [Image.fromarray(frame) for frame in frames]
    duration = _durations(len(frames), fps, 1)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, quality=90)


def _durations(count: int, fps: int, tick: int) -> list[int]:
    """Milliseconds of each frame, in whole ticks, so rounded that they do not drift from `fps`."""
    ends = [round(index * 1000 / fps / tick) * tick for index in range(count + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _write_sheet(frames: np.ndarray, path: Path, _fps: int) -> None:
    """All frames in reading order, as many rows as columns or one less, on white."""
    count, height, width, _ = frames.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    down, across = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * down - SHEET_GAP, columns * across - SHEET_GAP, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * down, index % columns * across
        sheet[top : top + height, left : left + width] = frame
    Image.fromarray(sheet).save(path)


def _write_folder(frames: np.ndarray, path: Path, _fps: int) -> None:
    path.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"frame_{index:04d}.png")


WRITERS = {
    ".mp4": _write_mp4,
    ".webm": _write_webm,
    ".gif": _write_gif,
    ".webp": _write_webp,
    ".png": _write_sheet,
    "": _write_folder,
}
