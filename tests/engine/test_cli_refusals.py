"""`svd-engine` on bad input: exit code 1 or 2, a message with what to do, and nothing left on the disk."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.bundle.manifest import FORMAT
from svd_engine.cli import console
from svd_engine.cli.main import main
from svd_engine.errors import OutputError
from tests.conftest import HEIGHT, WIDTH
from tests.support import damage
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `svd-engine generate`, which must fail with `code` and leave the folder of the output empty.

    The message on stderr is given back; it is one that we wrote, not a stack trace.
    """
    folder = tmp_path / "output"
    folder.mkdir()

    def run(*arguments: object, code: int, image: object = PHOTOGRAPH, output: object = "out.mp4") -> str:
        exited = call(main, "generate", image, "-o", folder / str(output), "--device", "cpu", *arguments)
        message = capsys.readouterr().err
        assert exited == code, message
        assert list(folder.iterdir()) == []
        assert "Traceback" not in message
        return " ".join(message.split())  # lines are folded at the terminal's width

    return run


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what must be said before the work starts: opening an engine is then an accident."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the work has started")

    monkeypatch.setattr(VideoEngine, "from_bundle", opened)
    monkeypatch.setattr(VideoEngine, "from_checkpoint", opened)


def bomb() -> bytes:
    """81 million pixels in ten kilobytes."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


IMAGES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "nothing at that path"),
    "empty": (b"", "an empty file"),
    "cut": (PHOTOGRAPH.read_bytes()[:2000], "a whole picture"),
    "no image": (b"GET / HTTP/1.1\r\n" * 100, "a whole picture"),
    "bomb": (bomb(), "9000 x 9000"),
}


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(("content", "part"), IMAGES.values(), ids=IMAGES)
def test_images(refused: Callable[..., str], tmp_path: Path, content: bytes | None, part: str) -> None:
    image = tmp_path / "photo.png"
    if content is not None:
        image.write_bytes(content)
    message = refused("--bundle", "unused", image=image, code=1)
    assert message.startswith(f"error: image {image}: expected ")
    assert part in message


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--frames", 0, "num_frames: expected a whole number of at least 1, got 0"),
        ("--frames", 14, "14 frames of 32x48. Ask for one of these, or run: svd-export onnx"),
        ("--steps", 0, "num_inference_steps: expected a whole number of at least 1, got 0"),
        ("--fps", 0, "fps: expected a whole number of at least 1, got 0"),
        ("--min-guidance-scale", "nan", "min_guidance_scale: expected a finite number, got nan"),
        ("--max-guidance-scale", "inf", "max_guidance_scale: expected a finite number, got inf"),
        ("--motion-bucket-id", 2000, "motion_bucket_id: expected 0 to 1023, got 2000.0"),
        ("--noise-aug-strength", -1, "noise_aug_strength: expected 0 or more, got -1.0"),
        ("--height", 30, "height: expected a multiple of 4 pixels, got 30"),
        ("--width", 0, "width: expected a whole number of at least 1, got 0"),
        ("--height", 64, "--height 64"),
        ("--decode-chunk-size", 0, "decode_chunk_size: expected a whole number of at least 1"),
        ("--decode-chunk-size", 1, "--decode-chunk 1"),
    ],
)
def test_settings(
    refused: Callable[..., str], tiny_bundle: Path, option: str, value: object, parts: str
) -> None:
    assert parts in refused("--bundle", tiny_bundle, option, value, code=2)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((), "pass either --bundle BUNDLE or --checkpoint CHECKPOINT"),
        (("--bundle", "b", "--checkpoint", "c"), "pass either --bundle BUNDLE or --checkpoint CHECKPOINT"),
        (
            ("--bundle", "b", "--dtype", "fp16"),
            "--lora-partial, --without-rewrite belong to --checkpoint",
        ),
        (
            ("--bundle", "b", "--without-rewrite", "x"),
            "--lora-partial, --without-rewrite belong to --checkpoint",
        ),
        (("--bundle", "b", "--num-videos", "0"), "num_videos_per_prompt: expected a whole number of"),
        (("--bundle", "b", "-o", ".", "--num-videos", "2"), "--num-videos numbers the outputs"),
        (
            ("--bundle", "b", "--report", "same.png", "-o", "same.png"),
            "two of the outputs have the same name",
        ),
        (("--bundle", "b", "-o", "new", "-o", "./new"), "two of the outputs have the same name"),
        (("--bundle", "b", "--seed", "-1"), "seed: expected a whole number from 0 to 2^64 - 1, got -1"),
        (("--bundle", "b", "--seed", str(2**64)), "seed: expected a whole number from 0 to 2^64 - 1"),
        (("--bundle", "b", "-o", "a.GIF", "--fps", "60"), "a GIF shows at most 50 frames a second"),
        (("--bundle", "b", "--backend", "openvino"), "backend: expected auto, tensorrt"),
        (("--bundle", "b", "--steps", "many"), "Invalid value for '--steps'"),
        (("--bundle", "b", "--steps", "2.5"), "'2.5' is not a whole number"),
        (("--bundle", "b", "--fit", "cover"), "'cover' is not one of"),
        (("--bundle", "b", "--continue-from", "v.mp4"), "pass one of IMAGE"),
        (("--bundle", "b", "--sigmas", "2,one"), "'2,one' is no list of numbers with commas between them"),
        (("--bundle", "b", "--sigmas", "1,2"), "sigmas: expected two or more finite noise levels that fall"),
        (("--bundle", "b", "--sigmas", "2,0", "--steps", "1"), "pass either --steps or --sigmas"),
        (("--bundle", "b", "--guidance-scales", "1,nan"), "guidance_scales: expected a finite number"),
    ],
)
def test_usage(refused: Callable[..., str], arguments: tuple[str, ...], parts: str) -> None:
    assert parts in refused(*arguments, code=2)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("output", "code", "parts"),
    [
        ("out.avi", 2, ".mp4, .webm, .gif, .webp, .png, or none for a folder of frames, got the suffix .avi"),
        ("none/out.mp4", 1, "no such folder. Create it (mkdir -p"),
        ("none/frames", 1, "no such folder. Create it (mkdir -p"),
    ],
)
def test_outputs_before_the_work_starts(
    refused: Callable[..., str], output: str, code: int, parts: str
) -> None:
    """Neither the bundle nor the image exists either; the output is said first."""
    assert parts in refused("--bundle", "none", image="none.jpg", output=output, code=code)


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("report", "parts"),
    [("none/run.json", "no folder "), (".", "expected a file name in an existing folder")],
)
def test_a_report_before_the_work_starts(
    refused: Callable[..., str], tmp_path: Path, report: str, parts: str
) -> None:
    message = refused("--bundle", "none", "--report", tmp_path / report, image="none.jpg", code=1)
    assert parts in message
    assert "Make the folder first, or choose another path." in message


def spoil_config(folder: Path) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "StableDiffusionPipeline"}))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
        (spoil_config, "StableDiffusionPipeline"),
        (lambda folder: shutil.rmtree(folder), "no such folder"),
        (lambda folder: next((folder / "unet").glob("*.safetensors")).unlink(), "unet"),
    ],
    ids=["no checkpoint", "another family", "no folder", "no weights"],
)
def test_checkpoints(
    refused: Callable[..., str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    parts: str,
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    spoil(folder)
    size = ("--frames", 2, "--height", HEIGHT, "--width", WIDTH, "--steps", 1)
    assert parts in refused("--checkpoint", folder, *size, code=1)


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, "no such folder. Make one with: svd-export onnx"),
        (lambda folder: (folder / "denoiser.bin").unlink(), "file denoiser.bin of bundle"),
        (lambda folder: damage.flip(folder / "vae_decoder.bin"), "got sha256"),
        (
            lambda folder: damage.edit(folder, lambda m: m.update(format=1)),
            f"expected bundle format {FORMAT}, got format 1",
        ),
    ],
    ids=["no folder", "file missing", "byte flipped", "another format"],
)
def test_bundles(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path, spoil: Callable[[Path], Any], parts: str
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    spoil(folder)
    message = refused("--bundle", folder, code=1)
    assert parts in message
    assert str(folder) in message


def test_a_backend_that_cannot_run_it(refused: Callable[..., str], tiny_bundle: Path) -> None:
    message = refused("--bundle", tiny_bundle, "--backend", "eager", code=1)
    assert "--checkpoint CHECKPOINT to run eager" in message


def test_info_of_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "info", tmp_path) == 1
    assert "expected a folder with manifest.json, got no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "r" * 250])
def test_a_small_file_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The disk is full, or the name too long for the hidden one beside it: what was there stays."""

    def full(self: Path, text: str, **_: str) -> int:
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("before")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"expected a place that can be written, got .*or free space"):
        console.write_text(tmp_path / name, "after")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "before"


def test_two_processes_write_the_same_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one's is there, whole, and no error."""
    write, path = Path.write_text, tmp_path / "run.json"

    def slow(self: Path, text: str, **options: Any) -> int:
        done = write(self, text, **options)
        monkeypatch.setattr(Path, "write_text", write)
        console.write_text(path, "other")  # meanwhile
        return done

    monkeypatch.setattr(Path, "write_text", slow)
    console.write_text(path, "mine")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"run.json": "mine"}


def test_a_device_stays_one(tmp_path: Path) -> None:
    """A rename would put a file in its place, for those who may."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for path in (Path("/dev/null"), tmp_path / "pipe", tmp_path / "stdout"):
        with pytest.raises(OutputError, match=r"got a device or a pipe\. Choose another path"):
            console.check_folder(path)


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_the_photograph_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    photograph = tmp_path / "photo.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(photograph)
    (tmp_path / "link.png").symlink_to(photograph)
    before = photograph.read_bytes()
    for name in ("photo.png", "link.png"):
        arguments = ("-o", tmp_path / "o.mp4", option, tmp_path / name, "--bundle", "b")
        assert call(main, "generate", photograph, *arguments) == 2
        assert "is what the video is made from" in " ".join(capsys.readouterr().err.split())
    assert photograph.read_bytes() == before


def test_a_name_that_the_stream_cannot_take_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows gives redirected output one alphabet; the video is written by then."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    console.run(lambda: print("wrote \u8996.mp4 \udcff"))
    stream.flush()
    assert stream.buffer.getvalue().decode("cp1252") == "wrote \\u8996.mp4 \\udcff\n"  # type: ignore[attr-defined]
    assert stream.errors == "strict"  # a host program's own


def test_a_small_file_is_written_whole(tmp_path: Path) -> None:
    console.check_folder(tmp_path / "run.json")
    console.write_text(tmp_path / "run.json", "{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "{}"}


@pytest.mark.usefixtures("early")
@pytest.mark.parametrize(
    ("clip", "more", "code", "parts"),
    [
        ("none.mp4", (), 1, "nothing at that path"),
        ("v.avi", (), 1, "expected a suffix out of .mp4, .mov, .webm, .mkv, .gif, .webp, or a folder"),
        ("none.mp4", ("--fit", "crop"), 2, "--fit does nothing with --continue-from"),
    ],
)
def test_clips_before_the_work_starts(
    clip: str,
    more: tuple[str, ...],
    code: int,
    parts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "v.avi").write_bytes(b"")
    arguments = ("--continue-from", tmp_path / clip, "-o", tmp_path / "out.mp4", "--bundle", "b", *more)
    assert call(main, "generate", *arguments) == code
    assert parts in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.mp4").exists()
