"""svd_engine.media.video, read back with PyAV and Pillow: what is written."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from svd_engine.errors import SettingsError
from svd_engine.media.video import ENCODERS, SHEET_GAP, WRITERS, to_uint8, write_video
from tests.support.messages import complete
from tests.support.pictures import CLIPS, FRAMES, HEIGHT, WIDTH


def psnr(read: np.ndarray, written: np.ndarray) -> float:
    """Decibels, over all frames and channels."""
    assert read.shape == written.shape
    return float(10 * np.log10(255**2 / np.mean((read.astype(np.float64) - written) ** 2)))


# ---------------------------------------------------------------------------- to_uint8


def test_bytes_are_rounded_as_diffusers_rounds_them() -> None:
    halves = (torch.arange(3 * 16 * 32) % 511 / 510).view(1, 3, 16, 32)  # k / 255 and the halves
    random = torch.rand(4, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    for frames in (halves, random, random.half(), random.double(), random.requires_grad_()):
        numpy = frames.detach().float().permute(0, 2, 3, 1).numpy()
        expected = np.stack([np.asarray(image) for image in VaeImageProcessor.numpy_to_pil(numpy)])
        read = to_uint8(frames)
        assert read.dtype == np.uint8
        assert np.array_equal(read, expected)


@pytest.mark.parametrize(
    ("frames", "got"),
    [
        (torch.zeros(3, 8, 8), "[3, 8, 8]"),
        (torch.zeros(2, 8, 8, 3), "[2, 8, 8, 3]"),
        (torch.zeros(0, 3, 8, 8), "[0, 3, 8, 8]"),
        (torch.full((2, 3, 8, 8), -0.5), "values from -0.5"),
        (torch.full((2, 3, 8, 8), 1.5), "to 1.5"),
        (torch.tensor([0.5, float("nan")]).repeat(1, 3, 8, 4), "nan"),
    ],
)
def test_frames_that_are_not_a_video_in_0_to_1_are_refused(frames: torch.Tensor, got: str) -> None:
    with pytest.raises(SettingsError) as caught:
        to_uint8(frames)
    complete(caught.value, "frames", got)


# ---------------------------------------------------------------------------- what is written


def read_video(path: Path) -> tuple[np.ndarray, av.VideoFrame, av.VideoStream]:
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
        full = "JPEG"  # range of the RGB, which PyAV 14 has to be told
        rgb = [frame.reformat(format="rgb24", dst_color_range=full).to_ndarray() for frame in frames]
        return np.stack(rgb), frames[-1], file.streams.video[0]


@pytest.mark.parametrize("fps", [7, 30])
@pytest.mark.parametrize(
    ("suffix", "clip", "codec", "bound"),
    [
        # decibels; halving the colours alone (yuv420p, nothing encoded) leaves 44.2 and 34.7
        (".mp4", "smooth", "h264", 42.5),
        (".mp4", "photo", "h264", 33.5),
        (".webm", "smooth", "vp9", 42),
        (".webm", "photo", "vp9", 33.5),
    ],
)
def test_a_video_reads_back(
    tmp_path: Path, suffix: str, clip: str, codec: str, bound: float, fps: int
) -> None:
    path = write_video(CLIPS[clip], tmp_path / f"clip{suffix}", fps)
    assert path == tmp_path / f"clip{suffix}"
    pixels, last, stream = read_video(path)
    assert stream.codec_context.name == codec
    assert stream.codec_context.pix_fmt == "yuv420p"
    assert stream.average_rate == fps
    assert (stream.width, stream.height) == (WIDTH, HEIGHT)
    assert abs(last.time - (FRAMES - 1) / fps) < 2e-3
    assert (last.colorspace, last.color_range) == (1, 1)  # BT.709, limited
    assert (stream.codec_context.color_primaries, stream.codec_context.color_trc) == (1, 1)
    assert psnr(pixels, CLIPS[clip]) > bound


def test_an_mp4_starts_with_its_index_so_that_it_plays_while_it_loads(tmp_path: Path) -> None:
    data = write_video(CLIPS["smooth"], tmp_path / "clip.mp4", 7).read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("suffix", "clip", "fps", "bound"),
    [
        (".gif", "smooth", 7, 27),  # decibels; a gradient in 256 colours
        (".gif", "photo", 30, 33),
        (".gif", "photo", 50, 33),
        (".webp", "smooth", 7, 42.5),
        (".webp", "photo", 30, 33.5),
    ],
)
def test_an_animation_reads_back(tmp_path: Path, suffix: str, clip: str, fps: int, bound: float) -> None:
    with Image.open(write_video(CLIPS[clip], tmp_path / f"clip{suffix}", fps)) as image:
        assert image.n_frames == FRAMES
        assert image.size == (WIDTH, HEIGHT)
        assert image.info["loop"] == 0
        pixels, durations = [], []
        for index in range(FRAMES):
            image.seek(index)
            pixels.append(np.asarray(image.convert("RGB")))
            durations.append(image.info["duration"])
    tick = 10 if suffix == ".gif" else 1  # milliseconds
    assert all(abs(duration - 1000 / fps) <= tick for duration in durations)
    assert abs(sum(durations) - FRAMES * 1000 / fps) <= tick / 2  # nothing drifts
    assert psnr(np.stack(pixels), CLIPS[clip]) > bound


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (7, 3, 3), (9, 3, 3), (10, 4, 3)]
)
def test_a_contact_sheet_holds_every_pixel(tmp_path: Path, count: int, columns: int, rows: int) -> None:
    clip = CLIPS["photo"][:count]
    with Image.open(write_video(clip, tmp_path / "sheet.png", 7)) as image:
        sheet = np.asarray(image)
    down, across = HEIGHT + SHEET_GAP, WIDTH + SHEET_GAP
    assert sheet.shape == (rows * down - SHEET_GAP, columns * across - SHEET_GAP, 3)
    unused = np.ones(sheet.shape, bool)
    for index, frame in enumerate(clip):
        cell = np.s_[index // columns * down :, index % columns * across :]
        assert np.array_equal(sheet[cell][:HEIGHT, :WIDTH], frame)
        unused[cell][:HEIGHT, :WIDTH] = False
    assert (sheet[unused] == 255).all()


@pytest.mark.parametrize("spelling", ["frames", "frames/", ".hidden"])
def test_a_folder_holds_every_frame(tmp_path: Path, spelling: str) -> None:
    folder = write_video(CLIPS["photo"], f"{tmp_path}/{spelling}", 7)
    assert folder == tmp_path / spelling
    names = [f"frame_{index:04d}.png" for index in range(FRAMES)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert folder.stat().st_mode & 0o777 == 0o777 & ~current_umask()
    for name, frame in zip(names, CLIPS["photo"], strict=True):
        assert np.array_equal(Image.open(folder / name), frame)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    columns_first = CLIPS["photo"].transpose(0, 2, 1, 3).copy()
    strided = columns_first.transpose(0, 2, 1, 3)  # the same frames, another order in memory
    runs = []
    for index, frames in enumerate([CLIPS["photo"], strided] * 3):
        path = write_video(frames, tmp_path / f"{index}{suffix}", 7)
        runs.append([file.read_bytes() for file in ([path] if suffix else sorted(path.iterdir()))])
    assert all(run == runs[0] for run in runs)
    if suffix == ".mp4":  # x264 notes its settings; the default thread count is the machine's
        assert b" threads=1 " in runs[0][0]


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_frame_is_a_video_too(tmp_path: Path, suffix: str) -> None:
    path = write_video(CLIPS["smooth"][:1], tmp_path / f"one{suffix}", 1)
    if suffix in ENCODERS:
        assert len(read_video(path)[0]) == 1
    elif suffix:
        assert Image.open(path).size == (WIDTH, HEIGHT)
    else:
        assert len(list(path.iterdir())) == 1
