"""What cannot become a video, or cannot be written, is refused, and leaves the disk as it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine.errors import OutputError, SettingsError
from svd_engine.media.video import ENCODERS, WRITERS, check_output, write_video
from tests.support.messages import complete
from tests.support.paths import PHOTOGRAPH
from tests.support.pictures import CLIPS, noise_clip

SOURCES = str(PHOTOGRAPH.parents[2])

# ---------------------------------------------------------------------------- what is refused before


def test_every_suffix_in_any_case_and_an_empty_folder_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.mp4").write_bytes(b"old")
    for name in (
        "a.mp4",
        "a.MP4",
        "a.webm",
        "a.gif",
        "a.webp",
        "a.png",
        "a",
        "a/",
        "empty",
        "empty/",
        "old.mp4",
    ):
        assert check_output(f"{tmp_path}/{name}") == tmp_path / name
        assert check_output(tmp_path / name) == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "old.mp4"]  # nothing was made
    write_video(CLIPS["smooth"], tmp_path / "A.GIF", 7)
    write_video(CLIPS["smooth"], tmp_path / "empty", 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A.GIF", "empty", "old.mp4"]


@pytest.mark.parametrize(
    "name", ["clip.avi", "clip.jpg", "clip.mp4.txt", "frames.v2", "clip.mp4/", "frames.v2/"]
)
def test_an_unknown_suffix_is_wrong_usage(tmp_path: Path, name: str) -> None:
    for call in (check_output, lambda path: write_video(CLIPS["smooth"], path, 7)):
        with pytest.raises(SettingsError) as caught:
            call(f"{tmp_path}/{name}")
        complete(caught.value, name, ".mp4, .webm, .gif, .webp, .png", Path(name).suffix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing/clip.mp4", "no such folder"),
        ("missing/frames", "mkdir -p"),
        ("file/clip.mp4", "got a file"),
        ("folder.mp4", "a folder of that name"),
        ("full", "not empty"),
        ("full/", "not empty"),
        ("file", "a file of that name"),
    ],
)
def test_a_place_that_cannot_take_the_output_is_refused(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for call in (check_output, lambda path: write_video(CLIPS["smooth"], path, 7)):
        with pytest.raises(OutputError) as caught:
            call(f"{tmp_path}/{name}")
        complete(caught.value, name, part)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_write_permission_is_refused() -> None:
    """As a user without root's rights, in a folder of root's or one that was made read-only."""
    code = f"""
import sys
sys.path.insert(0, {SOURCES!r})
from svd_engine.errors import OutputError
from svd_engine.media.video import check_output
import os
if os.geteuid() == 0:
    os.setuid(65534)  # nobody
try:
    check_output(sys.argv[1])
except OutputError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        target = f"{folder}/clip.gif"
        done = subprocess.run(
            [sys.executable, "-c", code, target], capture_output=True, text=True, check=True
        )
    for part in (target, "a writable folder", "no permission", "Change its permissions"):
        assert part in done.stdout


def test_a_pyav_without_the_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    for suffix, encoder in ENCODERS.items():
        with pytest.raises(OutputError) as caught:
            check_output(tmp_path / f"clip{suffix}")
        complete(caught.value, encoder, av.__version__, "pip install")
    check_output(tmp_path / "clip.webp")


@pytest.mark.parametrize("fps", [0, -7, 7.5, "7"])
def test_wrong_fps_is_refused(tmp_path: Path, fps: object) -> None:
    with pytest.raises(SettingsError) as caught:
        write_video(CLIPS["smooth"], tmp_path / "clip.mp4", fps)  # type: ignore[arg-type]
    complete(caught.value, "fps", repr(fps), "a whole number of at least 1")
    assert not list(tmp_path.iterdir())


def test_a_gif_faster_than_its_clock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        write_video(CLIPS["smooth"], tmp_path / "clip.gif", 51)
    complete(caught.value, "fps", "51", "from 1 to 50 for a GIF")


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        (np.zeros((2, 8, 8, 3), np.int16), "int16 [2, 8, 8, 3]"),
        (np.full((2, 8, 8, 3), 1.5), "values from 1.5 to 1.5"),
        (np.full((2, 8, 8, 3), np.nan, np.float32), "values from nan to nan"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), "uint8 [2, 2, 8, 8, 3]"),
        (torch.zeros(2, 4, 8, 8), "[2, 4, 8, 8]"),
        ([], "an empty list"),
        ([Image.new("RGB", (8, 8)), "frame.png"], "Image, str"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 6))], "several sizes"),
        ("frames", "str"),
        (np.zeros((8, 8, 3), np.uint8), "uint8 [8, 8, 3]"),
        (np.zeros((2, 3, 8, 8), np.uint8), "uint8 [2, 3, 8, 8]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "uint8 [0, 8, 8, 3]"),
        (np.zeros((2, 7, 8, 3), np.uint8), "7 x 8"),
        (np.zeros((2, 8, 7, 3), np.uint8), "8 x 7"),
    ],
)
def test_frames_that_no_video_can_hold_are_refused(tmp_path: Path, frames: Any, part: str) -> None:
    with pytest.raises(SettingsError) as caught:
        write_video(frames, tmp_path / "clip.mp4", 7)
    complete(caught.value, "frames", part)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- what failure leaves


@pytest.fixture(params=WRITERS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One target of each kind; where a file may be replaced, with an older one in place."""
    path = tmp_path / f"clip{request.param}"
    if request.param:
        path.write_bytes(b"precious")
    return path


def untouched(target: Path) -> None:
    assert list(target.parent.iterdir()) == ([target] if target.suffix else [])
    assert not target.suffix or target.read_bytes() == b"precious"


class Interrupted(np.ndarray):
    """Frames that press Ctrl-C while they are read for the fourth time."""

    reads = 0

    def __array_finalize__(self, _: object) -> None:
        Interrupted.reads += 1
        if Interrupted.reads == 4:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_midway_leaves_nothing(target: Path) -> None:
    frames = noise_clip().view(Interrupted)
    Interrupted.reads = 0
    with pytest.raises(KeyboardInterrupt):
        write_video(frames, target, 7)
    untouched(target)


def test_a_real_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    code = """
import sys
import numpy as np
from svd_engine.media.video import write_video
noise = np.random.default_rng(0).integers(0, 256, (400, 256, 256, 3), dtype=np.uint8)
write_video(noise, sys.argv[1], 7)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "clip.mp4")]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": SOURCES}, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".svd-engine-*/video.mp4")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in stderr
    assert not list(tmp_path.iterdir())


def test_no_space_left_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)  # the last step: everything is written already
    with pytest.raises(OutputError) as caught:
        write_video(noise_clip(), target, 7)
    complete(caught.value, str(target), "No space left on device", "Make room")
    untouched(target)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands for a full disk")
def test_a_write_that_really_fails_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to write beyond a limit: at the first byte, in the middle, and at the last byte."""
    code = """
import resource, signal, sys
from pathlib import Path
from typing import Any
import numpy as np
import PIL.GifImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin, av
from svd_engine.errors import OutputError
from svd_engine.media.video import WRITERS, write_video

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True
noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
folder = Path(sys.argv[1])
for suffix in WRITERS:
    sample = write_video(noise, folder / f"sample{suffix}", 7)
    size = max(path.stat().st_size for path in ([sample] if suffix else sample.iterdir()))
    for limit in (0, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write_video(noise, folder / f"clip{suffix}", 7)
        except OutputError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": SOURCES}
    lines = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()
    assert len(lines) == 3 * len(WRITERS)
    assert all("File too large. Nothing was written." in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"sample{suffix}" for suffix in WRITERS)


def test_an_encoder_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    too_wide = np.zeros((1, 2, 20_000, 3), np.uint8)  # H.264 ends at 16,384
    with pytest.raises(OutputError) as caught:
        write_video(too_wide, tmp_path / "clip.mp4", 7)
    complete(caught.value, "clip.mp4", "libx264", "choose another suffix")
    assert not list(tmp_path.iterdir())


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svd_engine.media.video.check_output", Path)  # it had said yes
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "note.txt").write_text("precious")
    with pytest.raises(OutputError) as caught:
        write_video(CLIPS["smooth"], tmp_path / "frames", 7)
    complete(caught.value, "frames", "not empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["frames", "note.txt"]
