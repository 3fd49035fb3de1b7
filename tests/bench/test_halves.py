"""The two halves of guidance in two processes: the same video as in two threads and as both at once."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from svd_bench import cli
from svd_bench.contest import halves
from svd_bench.contest.halves import (
    AT_ONCE,
    IN_TURN,
    PROCESSES,
    THREADS,
    HalvesDocument,
    halves_table,
    limited,
    open_there,
)
from svd_bench.subjects import other_process
from svd_bench.subjects.other_process import NetworkThere, OtherProcess
from svd_engine import VideoEngine
from svd_engine.errors import BackendError, CheckpointError, SettingsError
from svd_engine.residency.resident import Resident
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.test_guidance_parallel import TWO, made
from tests.support.commands import call
from tests.support.paths import ROOT


def engine_of(backend: str, source: Path, **where: Any) -> VideoEngine:
    opened = VideoEngine.from_checkpoint if backend == "eager" else VideoEngine.from_bundle
    return opened(source, backend=backend, memory=None, **where)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def ways(request: pytest.FixtureRequest) -> Iterator[dict[str, VideoEngine]]:
    source = request.getfixturevalue("tiny_checkpoint" if request.param == "eager" else "tiny_bundle")
    opened = partial(engine_of, request.param, source)
    apart = opened(devices=TWO)
    there = OtherProcess(request.param, partial(open_there, str(source), request.param, 1))
    apart.other_half = Resident(there)
    with apart, opened(devices=TWO) as threads, opened(device="cpu") as at_once:
        yield {PROCESSES: apart, THREADS: threads, AT_ONCE: at_once}


def children() -> list[multiprocessing.process.BaseProcess]:
    return multiprocessing.active_children()


def test_the_same_video_and_an_end_is_told(ways: dict[str, VideoEngine]) -> None:
    """One process after the other, for starting one takes seconds."""
    frames, reports = {}, {}
    for way, engine in ways.items():
        output = made(engine)
        frames[way], reports[way] = output.frames, output.report
    assert torch.equal(frames[PROCESSES], frames[THREADS])
    assert float((frames[PROCESSES] - frames[AT_ONCE]).abs().max()) <= 1e-5
    assert reports[PROCESSES].exchanged_bytes == reports[THREADS].exchanged_bytes > 0
    assert "denoiser, unconditional half" in reports[PROCESSES].stages

    apart = ways[PROCESSES]
    (other,) = children()
    assert other.pid != os.getpid()
    other.kill()
    told = rf"process {other.pid} of denoiser.*expected it to run.*exit code -9.*Close the engine"
    with pytest.raises(BackendError, match=told):
        made(apart)
    with pytest.raises(BackendError, match=told):  # also of a pipe that is known to be closed
        made(apart)
    apart.close()
    assert children() == []


class Refuses:
    """A backend that cannot open anything."""

    def open(self, spec: Any) -> Any:
        raise CheckpointError("weights", expected="a file", got="none", remedy="Copy it.")


def test_an_error_there_is_raised_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends in this process, for starting another takes seconds."""
    monkeypatch.setattr(other_process.signal, "signal", lambda *_: None)
    here = NetworkThere.__new__(NetworkThere)
    here.pipe, theirs = multiprocessing.Pipe()
    other_process._serve(theirs, Refuses, None, {}, {}, torch.get_num_threads())
    with pytest.raises(CheckpointError, match=r"weights: expected a file, got none\. Copy it\."):
        here._answer()


def test_errors_travel() -> None:
    error = SettingsError("steps", expected="1", got="0", remedy="Pass 1.")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.remedy) == (SettingsError, str(error), "Pass 1.")


def test_threads_are_limited_and_come_back() -> None:
    before, options = torch.get_num_threads(), onnxruntime.SessionOptions
    with limited(before + 1):
        assert torch.get_num_threads() == before + 1
        assert onnxruntime.SessionOptions().intra_op_num_threads == before + 1
    assert (torch.get_num_threads(), onnxruntime.SessionOptions) == (before, options)


class InThisProcess(OtherProcess):
    """Opens here: what the command does is the same."""

    def open(self, spec: Any) -> Any:
        return self.open_backend().open(spec)


def test_the_command(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(halves, "OtherProcess", InThisProcess)
    monkeypatch.setattr(halves, "open_there", partial(open_here, halves.open_there))
    size = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH)
    command = (
        "halves",
        "--checkpoint",
        tiny_checkpoint,
        *size,
        "--steps",
        1,
        "--repeat",
        2,
        "--out",
        tmp_path,
    )
    assert call(cli.main, *command, "--backends", "eager") == 0
    document = HalvesDocument.model_validate_json((tmp_path / "halves.json").read_bytes())
    rows = {row.way: row for row in document.rows}
    assert list(rows) == [THREADS, PROCESSES, IN_TURN, AT_ONCE]
    assert rows[PROCESSES].max_abs_difference == rows[THREADS].max_abs_difference == 0
    assert rows[PROCESSES].exchanged_bytes == rows[THREADS].exchanged_bytes > rows[AT_ONCE].exchanged_bytes
    assert rows[THREADS].of_threads.median == 1
    assert "one device, at once" in capsys.readouterr().out
    assert call(cli.main, *command, "--backends", "compiled") == 2
    assert call(cli.main, *command, "--backends", ",") == 2


@pytest.mark.parametrize(("option", "number"), [("--frames", 0), ("--height", 0), ("--width", 65)])
def test_a_size_that_is_none_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, option: str, number: int
) -> None:
    command = ("halves", "--checkpoint", tiny_checkpoint, option, number, "--out", tmp_path / "out")
    assert call(cli.main, *command) == 2
    assert list(tmp_path.iterdir()) == []


def open_here(opened: Any, source: str, backend: str, threads: int) -> Any:
    """Leaves this process's threads as they are."""
    with limited(threads):
        return opened(source, backend, threads)


def test_the_page_shows_the_committed_figures() -> None:
    committed = ROOT / "benchmarks/svd_bench/results/halves/halves.json"
    shown = halves_table(HalvesDocument.model_validate_json(committed.read_bytes()))
    assert shown.markdown().strip() in (ROOT / "docs/two-devices.md").read_text()
