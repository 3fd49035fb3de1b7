"""The scripts of examples/python run as they are shown, over a tiny bundle."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.paths import PHOTOGRAPH, ROOT

SCRIPTS = ROOT / "examples" / "python"


def run(script: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")


def test_generate(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate.py", tiny_bundle, PHOTOGRAPH, tmp_path / "video.mp4")
    assert (tmp_path / "video.mp4").stat().st_size
    assert json.loads(capsys.readouterr().out)["seeds"] == [42]


def test_batch(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copy(PHOTOGRAPH, tmp_path / "other.png")
    run("batch.py", tiny_bundle, tmp_path / "videos", PHOTOGRAPH, other)
    assert {path.name for path in (tmp_path / "videos").iterdir()} == {"coffee.mp4", "other.mp4"}
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(", std")[0] for line in told] == [
        f"{name}: step {step} of 25" for name in ("coffee", "other") for step in range(1, 26)
    ]


def test_own_noise_levels(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svd_engine import VideoEngine

    steps: list[int] = []
    call = VideoEngine.__call__

    def watched(engine: VideoEngine, *args: object, **kwargs: object) -> object:
        result = call(engine, *args, **kwargs)  # type: ignore[arg-type]
        steps.append(engine.num_timesteps)
        return result

    monkeypatch.setattr(VideoEngine, "__call__", watched)
    run("sigmas.py", tiny_bundle, PHOTOGRAPH, tmp_path / "video.mp4")
    assert steps == [15]
    assert (tmp_path / "video.mp4").stat().st_size


@pytest.mark.parametrize(("seconds", "told"), [(0, "no video after 0 s"), (600, "wrote ")])
def test_cancel(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seconds: int, told: str
) -> None:
    run("cancel.py", tiny_bundle, PHOTOGRAPH, tmp_path / "video.mp4", seconds)
    assert told in capsys.readouterr().out
    assert (tmp_path / "video.mp4").exists() == (seconds > 0)
