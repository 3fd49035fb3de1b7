"""Peaks: the sampler sees what comes and goes, a child holds one subject and says what it took."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import psutil
import pytest
import torch

from svd_bench.measuring.memory import Peaks, PeakSampler, release
from svd_bench.memory import peaks as memory
from svd_bench.memory.peaks import peaks_in_child
from svd_bench.subjects.cases import Case, Subject
from svd_engine.errors import BackendError, CheckpointError
from tests.bench import documents
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH


def test_the_sampler_sees_a_peak_that_is_gone_at_the_end() -> None:
    value, seen = 3, threading.Event()

    def read() -> int:
        if value == 9:
            seen.set()
        return value

    with PeakSampler(read, interval_s=0.0001) as sampler:
        value = 9
        assert seen.wait(10)
        value = 4
    assert sampler.peak == 9


def test_the_sampler_reads_at_the_beginning_and_at_the_end() -> None:
    values = iter([5, 8])
    with PeakSampler(lambda: next(values), interval_s=1000) as sampler:
        pass
    assert sampler.peak == 8


def case(checkpoint: str) -> Case:
    setting = documents.setting(frames=FRAMES, height=HEIGHT, width=WIDTH, decode_chunk=CHUNK)
    subject = Subject(
        name="svd-engine", backend="eager", checkpoint=checkpoint, device="cpu", dtype="float32"
    )
    return Case(subject=subject, stage="vae_decoder", setting=setting)


def test_a_child_measures_itself(tiny_checkpoint: Path) -> None:
    peaks = peaks_in_child(case(str(tiny_checkpoint)))
    assert peaks.host is not None
    assert 2**27 < peaks.host < psutil.virtual_memory().total  # torch alone is more than 128 MiB
    assert (peaks.driver, peaks.torch) == (None, None)


@pytest.mark.parametrize(
    ("script", "got"),
    [
        ("kill -9 $$", "got killed, as when memory runs out"),
        (
            "echo Traceback >&2; echo CheckpointError: gone >&2; exit 1",
            "got CheckpointError: gone.* --no-memory",
        ),
    ],
)
def test_a_child_that_fails_is_heard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, got: str
) -> None:
    program = tmp_path / "dies"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "executable", str(program))
    with pytest.raises(BackendError, match=rf"peak memory of vae_decoder, .*{got}"):
        peaks_in_child(case("demo"))


def test_what_fails_a_child(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        memory.measure_peaks(case(str(tmp_path / "missing")))


def test_what_was_not_measured_is_none() -> None:
    assert Peaks() == Peaks(host=None, driver=None, torch=None)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc only")
def test_freed_memory_goes_back_to_the_system() -> None:
    """In blocks that glibc would keep: the second time, it has learnt that they come and go."""
    process = psutil.Process()
    for _ in range(2):
        blocks = [torch.ones(2**20) for _ in range(64)]  # 256 MiB in all
        held = process.memory_info().rss
        del blocks
    release()
    assert held - process.memory_info().rss > 2**27
