"""`svd-engine generate` as a user meets it when all is well: files, reports, progress, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from svd_engine import __version__
from svd_engine.cli.main import main
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.support import damage
from tests.support.commands import call, start
from tests.support.paths import PHOTOGRAPH

QUICK = ("--steps", 2, "--device", "cpu")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def decoded(path: Path) -> tuple[list[np.ndarray], float]:
    """Frames [H,W,3] of a video, and frames a second, as PyAV reads them."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        rate = float(stream.average_rate or 0)
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)], rate


def test_a_photograph_becomes_a_video(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, report = tmp_path / "out.mp4", tmp_path / "run.json"
    code = call(
        main, "generate", PHOTOGRAPH, "-o", video, "--bundle", tiny_bundle, "--report", report,
        "--seed", 3, "--fps", 5, "--motion-bucket-id", 31, *QUICK,
    )  # fmt: skip
    assert code == 0
    frames, rate = decoded(video)
    assert [frame.shape for frame in frames] == [(HEIGHT, WIDTH, 3)] * FRAMES
    assert rate == 5
    assert float(np.std(frames)) > 1  # not a grey one
    assert names(tmp_path) == ["out.mp4", "run.json"]

    written = json.loads(report.read_text())
    assert written["seeds"] == [3]
    assert (written["settings"]["fps"], written["settings"]["motion_bucket_id"]) == (5, 31)
    assert len(written["step_ms"]) == 2

    out, err = capsys.readouterr()
    assert "onnxruntime on cpu (asked for)" in err
    assert "the photograph, 600 x 400, is squeezed into" not in err  # the same proportions as the video
    assert "it/s" not in err  # one progress bar, not the engine's beside ours
    assert "2/2" in err  # the progress bar
    for stage in ("image_encoder", "vae_encoder", "denoiser", "vae_decoder"):
        assert re.search(rf"{stage} +\d+ ms +onnxruntime cpu float32", out)
    assert f"wrote {video}" in out


def test_several_videos_into_several_formats(tiny_bundle: Path, tmp_path: Path) -> None:
    code = call(
        main, "generate", PHOTOGRAPH, "--bundle", tiny_bundle, "--num-videos", 2,
        "-o", tmp_path / "a.png", "-o", tmp_path / "frames", *QUICK,
    )  # fmt: skip
    assert code == 0
    assert names(tmp_path) == ["a-0.png", "a-1.png", "frames-0", "frames-1"]
    assert names(tmp_path / "frames-1") == [f"frame_{index:04d}.png" for index in range(FRAMES)]
    first, second = (np.asarray(Image.open(tmp_path / f"frames-{n}/frame_0000.png")) for n in (0, 1))
    assert (first != second).any()  # one generator, two draws


def test_the_same_seed_gives_the_same_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ("-o", tmp_path / f"{name}.png", "--bundle", tiny_bundle, "--seed", seed, *QUICK)
        assert call(main, "generate", PHOTOGRAPH, *arguments) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_networks_can_be_swapped(tiny_bundle: Path, tmp_path: Path) -> None:
    code = call(
        main, "generate", PHOTOGRAPH, "-o", tmp_path / "out.mp4", "--bundle", tiny_bundle, "--swap-networks",
        "--report", tmp_path / "run.json", *QUICK,
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "run.json").read_text())["swap_networks"] is True


def test_a_checkpoint_takes_any_size(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(
        main, "generate", PHOTOGRAPH, "-o", tmp_path / "out.mp4", "--checkpoint", tiny_checkpoint,
        "--backend", "eager", "--frames", 2, "--height", 24, "--width", 20, "--without-rewrite", "fused-qkv",
        *QUICK,
    )  # fmt: skip
    assert code == 0
    frames, _ = decoded(tmp_path / "out.mp4")
    assert [frame.shape for frame in frames] == [(24, 20, 3)] * 2
    assert "eager cpu float32" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    process = start(
        "svd-engine", "generate", PHOTOGRAPH, "-o", tmp_path / "out.mp4", "--bundle", tiny_bundle,
        "--report", tmp_path / "run.json", "--steps", 100_000, "--device", "cpu",
        FORCE_COLOR="1", TERM="xterm",
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while not re.search(r"[1-9]\d*/100000", seen):  # denoising
        character = process.stderr.read(1)
        assert character, seen
        seen += character
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in out + err
    assert names(tmp_path) == []


def test_random_weights_are_said_to_be_random(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    damage.edit(folder, lambda manifest: manifest["model"].update(random_weights=True))
    arguments = ("-o", tmp_path / "out.mp4", "--bundle", folder, "--report", tmp_path / "run.json", *QUICK)
    assert call(main, "generate", PHOTOGRAPH, *arguments) == 0
    assert "random weights: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["random_weights"] is True


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_info_of_a_bundle(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "info", tiny_bundle) == 0
    out = capsys.readouterr().out
    assert re.search(rf"profile 1 +{FRAMES} frames, {HEIGHT}x{WIDTH}", out)
    assert "onnxruntime on cpu: ready" in out
    assert "onnxruntime on cuda: " in out
    assert "eager" not in out  # a bundle runs on ONNX Runtime only


def test_info_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "info") == 0
    out = capsys.readouterr().out
    assert re.search(r"GPU\S* ", out)
    assert re.search(rf"svd-engine +{__version__}", out)
    assert "eager on cpu: ready" in out
    assert "compiled on cuda: " in out


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main) == 2
    out, err = capsys.readouterr()
    assert "generate" in out + err
