"""Clips in: what `write_video` wrote is read back, and what is no clip is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svd_engine import ImageError, SettingsError, write_video
from svd_engine.media import clip
from svd_engine.media.clip import read_video
from svd_engine.media.motion import psnr
from tests.support.messages import complete
from tests.support.pictures import CLIPS, noise

SMOOTH = CLIPS["smooth"]


@pytest.mark.parametrize("fps", [7, 24])
@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 40), (".webm", 40), (".webp", 35), (".gif", 26)])
def test_a_written_video_is_read_back(suffix: str, least: float, fps: int, tmp_path: Path) -> None:
    """Decibels, of a gradient whose colours another matrix or range would shift."""
    read = read_video(write_video(SMOOTH, tmp_path / f"v{suffix}", fps))
    assert (read.frames.dtype, read.frames.shape) == (np.uint8, SMOOTH.shape)
    assert psnr(read.frames / 255, SMOOTH / 255) >= least
    assert read.fps == pytest.approx(fps, rel=0.02)


def test_a_folder_is_read_as_it_was_written_and_in_order(tmp_path: Path) -> None:
    folder = write_video(SMOOTH, tmp_path / "frames", 7)
    (folder / "notes.txt").write_text("no picture")
    read = read_video(str(folder))
    assert np.array_equal(read.frames, SMOOTH)
    assert read.fps is None


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_that_an_animation_merged_come_back(suffix: str, tmp_path: Path) -> None:
    held = SMOOTH[[0, 0, 0, 1, 2, 2, 3]]
    read = read_video(write_video(held, tmp_path / f"v{suffix}", 7))
    assert len(read.frames) == len(held)
    assert [np.array_equal(a, b) for a, b in zip(read.frames, read.frames[1:], strict=False)] == [
        True, True, False, False, True, False,
    ]  # fmt: skip


def test_an_animation_without_durations_has_no_rate(tmp_path: Path) -> None:
    first, second = noise(8, 8), noise(8, 8, seed=1)
    first.save(tmp_path / "v.gif", save_all=True, append_images=[second])
    read = read_video(tmp_path / "v.gif")
    assert (len(read.frames), read.fps) == (2, None)


def cut(path: Path) -> Path:
    whole = write_video(SMOOTH, path, 7).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sizes = tmp_path / "sizes"
    sizes.mkdir()
    for index, side in enumerate((8, 16)):
        noise(side, side).save(sizes / f"{index}.png")
    (tmp_path / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    (tmp_path / "text.gif").write_text("no picture")
    (tmp_path / "sheet.png").write_bytes(b"")
    (tmp_path / "none").write_bytes(b"")
    noise(8, 8).save(tmp_path / "one.webp")
    cases = {
        "missing.mp4": "got nothing at that path",
        "sheet.png": "got the suffix .png",
        "none": "got none",
        "empty": "expected pictures in that folder",
        "sizes": "frames of one size, 8 x 8 as the first, got 16 x 16 in frame 1",
        "playlist.mp4": "a whole video in the format of its suffix",
        "text.gif": "a whole video in the format of its suffix",
        "one.webp": "two frames or more, got one",
    }
    for name, part in cases.items():
        with pytest.raises(ImageError) as caught:
            read_video(tmp_path / name)
        complete(caught.value, f"clip {tmp_path / name}: ", part)
    for name in ("cut.mp4", "cut.webp"):
        with pytest.raises(ImageError, match="a whole video in the format of its suffix"):
            read_video(cut(tmp_path / name))
    with pytest.raises(SettingsError, match="clip: expected a path"):
        read_video(3)  # type: ignore[arg-type]


def test_a_clip_of_too_many_pixels_is_refused_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_video(SMOOTH, tmp_path / "v.webp", 7)
    monkeypatch.setattr(clip, "MAX_CLIP_PIXELS", 3 * SMOOTH[0, :, :, 0].size)
    with pytest.raises(ImageError, match=r"at most 46,080 pixels in all frames.*in 4 frames of 160 x 96"):
        read_video(written)


def test_one_frame_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_video(SMOOTH, tmp_path / "v.gif", 7)
    monkeypatch.setattr(clip, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="and 100 in one"):
        read_video(written)


def test_pictures_of_a_folder_are_upright_rgb(tmp_path: Path) -> None:
    for index in range(2):
        Image.new("L", (8, 4), 100).save(tmp_path / f"{index}.jpg")
    assert read_video(tmp_path).frames.shape == (2, 4, 8, 3)
