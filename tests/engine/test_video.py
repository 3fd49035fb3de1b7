"""svd_engine.video, read back with PyAV and Pillow: what is written, what is refused, what failure leaves."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from svd_engine.errors import OutputError, SettingsError, SvdEngineError
from svd_engine.video import ENCODERS, SHEET_GAP, WRITERS, check_output, to_uint8, write_video
from tests.paths import PHOTOGRAPH

SOURCES = str(PHOTOGRAPH.parents[2])
FRAMES, HEIGHT, WIDTH = 10, 96, 160


def smooth_clip() -> np.ndarray:
    """A coloured gradient with a soft spot that moves across it.  [F, H, W, 3] uint8"""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    spots = [np.exp(-(((x - f / FRAMES) ** 2 + (y - 0.3) ** 2) * 40)) for f in range(FRAMES)]
    clip = np.stack([np.stack([x, 0.7 * y + 0.3 * spot, 0.2 + 0.6 * spot], -1) for spot in spots])
    return (clip * 255).round().astype(np.uint8)


def photo_clip() -> np.ndarray:
    """A camera move over the photograph, from the saucer up to the cup.  [F, H, W, 3] uint8"""
    photo = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))
    return np.stack([photo[240 - 8 * f :, 240 + 3 * f :][:HEIGHT, :WIDTH] for f in range(FRAMES)])


def noise_clip(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)


CLIPS = {"smooth": smooth_clip(), "photo": photo_clip()}


def psnr(read: np.ndarray, written: np.ndarray) -> float:
    """Decibels, over all frames and channels."""
    assert read.shape == written.shape
    return float(10 * np.log10(255**2 / np.mean((read.astype(np.float64) - written) ** 2)))


def complete(error: SvdEngineError, *parts: str) -> None:
    """The message names everything that a user needs, and in particular `parts`."""
    assert error.what
    assert error.expected
    assert error.got
    assert error.remedy.endswith(".")
    for part in (error.what, error.expected, error.got, error.remedy, *parts):
        assert part in str(error)


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
from svd_engine.video import check_output
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
    complete(caught.value, "fps", repr(fps), "whole number from 1,")
    assert not list(tmp_path.iterdir())


def test_a_gif_faster_than_its_clock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        write_video(CLIPS["smooth"], tmp_path / "clip.gif", 51)
    complete(caught.value, "fps", "51", "from 1 to 50 for a GIF")


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "float32 [2, 8, 8, 3]"),
        (np.zeros((8, 8, 3), np.uint8), "uint8 [8, 8, 3]"),
        (np.zeros((2, 3, 8, 8), np.uint8), "uint8 [2, 3, 8, 8]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "uint8 [0, 8, 8, 3]"),
        (np.zeros((2, 7, 8, 3), np.uint8), "7 x 8"),
        (np.zeros((2, 8, 7, 3), np.uint8), "8 x 7"),
    ],
)
def test_frames_that_no_video_can_hold_are_refused(tmp_path: Path, frames: np.ndarray, part: str) -> None:
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
from svd_engine.video import write_video
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
import numpy as np
import PIL.GifImagePlugin, PIL.PngImagePlugin, PIL.WebPImagePlugin, av
from svd_engine.errors import OutputError
from svd_engine.video import WRITERS, write_video

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
    monkeypatch.setattr("svd_engine.video.check_output", Path)  # it had said yes
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "note.txt").write_text("precious")
    with pytest.raises(OutputError) as caught:
        write_video(CLIPS["smooth"], tmp_path / "frames", 7)
    complete(caught.value, "frames", "not empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["frames", "note.txt"]
