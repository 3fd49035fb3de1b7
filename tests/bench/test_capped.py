"""One attempt under a memory cap: what it answers, with a made-up engine and with real small networks."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from shlex import quote
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_bench.memory import capped, emulate
from svd_bench.memory.capped import Answer, attempt_videos, open_engine
from svd_engine import VideoEngine
from svd_engine.backends import choose
from svd_engine.errors import BackendUnavailable
from tests.bench import documents
from tests.bench.documents import GIB
from tests.bench.fakes import ATTEMPT


class FakeEngine:
    """Calls back after every step and then does what it is told, once for each video."""

    def __init__(self, steps: int, *ends: Exception | None, backend: str = "eager") -> None:
        self.steps, self.ends, self.backend = steps, iter(ends), backend

    def __call__(self, *_: object, callback_on_step_end: Any, **__: object) -> Any:
        for step in range(self.steps):
            callback_on_step_end(self, step, None, {})
        if end := next(self.ends):
            raise end
        stage = SimpleNamespace(backend=self.backend, device="cpu", dtype="float32")
        report = SimpleNamespace(
            stages={"denoiser": stage, "vae_decoder": stage}, rewrites={"unet/a": 3, "vae/b": 0, "vae/a": 1},
            model="demo", random_weights=True, total_ms=7.0, peak_device_bytes=11, peak_host_bytes=13,
        )  # fmt: skip
        return SimpleNamespace(report=report)


def out_of_memory_in_another() -> Exception:
    error = RuntimeError("compiling failed")
    error.__cause__ = torch.OutOfMemoryError("no memory")
    return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), out_of_memory_in_another()])
@pytest.mark.parametrize(("steps", "stage"), [(1, "denoiser"), (2, "vae_decoder")])
def test_running_out_of_memory_is_an_answer(error: Exception, steps: int, stage: str) -> None:
    assert attempt_videos(ATTEMPT, FakeEngine(steps, None, error)) == Answer(stopped_in=stage)  # type: ignore[arg-type]


def test_any_other_error_is_none() -> None:
    with pytest.raises(ValueError, match="boom"):
        attempt_videos(ATTEMPT, FakeEngine(2, ValueError("boom")))  # type: ignore[arg-type]


def test_a_row_says_what_ran() -> None:
    answer = attempt_videos(ATTEMPT, FakeEngine(2, None, None))  # type: ignore[arg-type]
    assert answer.row is not None
    assert answer.row.rewrites == ("a",)
    assert answer.row.latency_ms.runs == 1
    assert (answer.row.latency_ms.median, answer.row.first_call_ms) == (7.0, 7.0)
    assert (answer.row.peak_torch_bytes, answer.row.peak_host_bytes) == (11, 13)
    assert answer.row.setting.decode_chunk == 14


def test_a_fallback_is_never_measured() -> None:
    engine = FakeEngine(2, None, None, backend="compiled")
    with pytest.raises(BackendUnavailable, match="attempt with backend eager: expected every stage on eager"):
        attempt_videos(ATTEMPT, engine)  # type: ignore[arg-type]


SMALL = ATTEMPT.model_copy(
    update={"frames": 3, "height": 64, "width": 64, "guidance": "single", "decode_chunk": 2, "steps": 1}
)


def test_one_attempt_with_real_networks() -> None:
    """Without guidance `VideoEngine.from_checkpoint` runs the same profile: the same numbers come out."""
    asked: dict[str, Any] = {"num_frames": 3, "height": 64, "width": 64, "num_inference_steps": 1}
    asked |= {"max_guidance_scale": 1.0, "decode_chunk_size": 2, "output_type": "pt"}
    image = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    with open_engine(SMALL) as engine:
        answer = attempt_videos(SMALL, engine)
        single = engine(image, generator=torch.manual_seed(0), **asked)
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu") as engine:
        expected = engine(image, generator=torch.manual_seed(0), **asked)
    assert torch.equal(single.frames, expected.frames)
    assert "single guidance, decode chunk 2" in single.report.profile
    assert answer.row is not None
    assert answer.row.setting == documents.setting(
        model="demo", random_weights=False, frames=3, height=64, width=64, guidance="single",
        decode_chunk=2, steps=1,
    )  # fmt: skip
    assert (answer.row.subject, answer.row.backend, answer.row.device) == ("svd-engine", "eager", "cpu")
    assert answer.row.peak_torch_bytes is None  # no GPU


def test_a_subprocess_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    answer = emulate.in_subprocess(SMALL.model_copy(update={"note": "emulated cap 8 GB"}))
    assert answer.row is not None
    assert answer.row.note == "emulated cap 8 GB"


def test_a_subprocess_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last words are the answer."""
    elsewhere = SMALL.model_copy(update={"device": "cuda:7"})
    with pytest.raises(BackendUnavailable, match="device cuda:7") as caught:
        open_engine(elsewhere)
    program = tmp_path / "fails"
    program.write_text(f"#!/bin/sh\necho Traceback >&2\necho {quote(str(caught.value))} >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(emulate.sys, "executable", str(program))
    failed = emulate.in_subprocess(elsewhere)
    assert not failed.fits
    assert failed.failed == f"exit code 1: {caught.value}"


def test_the_cap_is_a_share_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(choose, "resolve", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=140 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device))
    )
    open_engine(ATTEMPT.model_copy(update={"cap": 7 * GIB, "device": "cuda"}))
    assert asked == [(pytest.approx(0.05), torch.device("cuda", 0))]


def test_main_prints_the_answer_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["capped", ATTEMPT.model_dump_json()])
    monkeypatch.setattr(capped, "open_engine", lambda _: nullcontext(FakeEngine(2, None, None)))
    capped.main()
    assert Answer.model_validate_json(capsys.readouterr().out.splitlines()[-1]).fits
