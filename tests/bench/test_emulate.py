"""Emulated tiers: the walk over attempts with a made-up GPU, and one attempt with real small networks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svd_bench import capped, cli, emulate, environment
from svd_bench.capped import Answer, Attempt, attempt_videos, open_engine
from svd_bench.cards import TIERS, Tier
from svd_bench.emulate import CONTEXT, Tried, smaller_tiers, walk
from svd_bench.recorder import Recorder
from svd_bench.results import read_results
from svd_engine import VideoEngine
from svd_engine.backends import choose
from svd_engine.checkpoint import open_checkpoint
from svd_engine.errors import BackendUnavailable, SettingsError
from tests.bench import documents
from tests.commands import call

GIB = 2**30
BASE = Attempt(
    checkpoint="demo", backend="eager", device="cpu", cap=None, note="", frames=14, height=128, width=192,
    guidance="batched", networks="resident", decode_chunk=14, steps=2, repeat=1,
)  # fmt: skip


class MadeUpGpu:
    """Needs 9 GiB for the denoiser, 5 with guidance "single", 1 less swapped; half a GiB for each frame."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []

    def __call__(self, attempt: Attempt) -> Answer:
        self.attempts.append(attempt)
        assert attempt.cap is not None
        denoiser = (9 if attempt.guidance == "batched" else 5) * GIB
        denoiser -= GIB * (attempt.networks == "swapped")
        decoder = 2 * GIB + attempt.decode_chunk * GIB // 2
        if denoiser > attempt.cap:
            return Answer(stopped_in="denoiser")
        if decoder > attempt.cap:
            return Answer(stopped_in="vae_decoder")
        fits = documents.row(
            backend=attempt.backend, note=attempt.note, peak_torch_bytes=max(denoiser, decoder),
            setting=documents.setting(
                frames=attempt.frames, guidance=attempt.guidance, decode_chunk=attempt.decode_chunk,
                networks=attempt.networks,
            ),
        )  # fmt: skip
        return Answer(row=fits)


def tier(name: str) -> Tier:
    return next(tier for tier in TIERS if tier.name == name)


def test_the_walk_goes_down_until_the_answer_is_known() -> None:
    gpu = MadeUpGpu()
    tried = list(walk(BASE, [tier("8"), tier("16")], ["eager"], [25], gpu))
    said = [
        (t.tier.name, t.attempt.guidance, t.attempt.networks, t.attempt.decode_chunk, t.verdict)
        for t in tried
    ]
    assert said == [
        ("8", "batched", "resident", 25, "does not fit (denoiser)"),  # no smaller chunk is tried
        ("8", "batched", "swapped", 25, "does not fit (denoiser)"),
        ("8", "single", "resident", 25, "does not fit (vae_decoder)"),
        ("8", "single", "resident", 8, "fits"),
        ("8", "single", "swapped", 25, "does not fit (vae_decoder)"),
        ("8", "single", "swapped", 8, "fits"),
        ("16", "batched", "resident", 25, "fits"),  # then it fits swapped as well
        ("16", "single", "resident", 25, "fits"),
    ]


def test_the_walk_covers_backends_and_frames_under_a_hard_cap() -> None:
    gpu = MadeUpGpu()
    list(walk(BASE, [tier("16"), tier("40/48")], ["eager", "compiled"], [14, 25], gpu))
    assert {(a.backend, a.frames) for a in gpu.attempts} == {
        (backend, frames) for backend in ("eager", "compiled") for frames in (14, 25)
    }
    assert {(a.cap, a.note) for a in gpu.attempts} == {
        (16 * GIB - CONTEXT, "emulated cap 16 GB"),
        (40 * GIB - CONTEXT, "emulated cap 40 GB"),
    }
    assert {a.steps for a in gpu.attempts} == {BASE.steps}


def test_an_attempt_that_breaks_does_not_stop_the_walk() -> None:
    tried = list(walk(BASE, [tier("8")], ["eager"], [14], lambda _: Answer(failed="exit code 1: boom")))
    assert [t.verdict for t in tried] == ["failed: exit code 1: boom"] * 2  # both guidance modes


def test_chunks_are_smaller_than_the_frames() -> None:
    tried = list(walk(BASE, [tier("8")], ["eager"], [4], lambda _: Answer(stopped_in="vae_decoder")))
    assert [t.attempt.decode_chunk for t in tried] == [4, 2, 1] * 4


def test_only_smaller_tiers_are_emulated() -> None:
    assert [t.name for t in smaller_tiers(140 * GIB)] == ["8", "12", "16", "24", "40/48", "80"]
    assert [t.name for t in smaller_tiers(24 * GIB)] == ["8", "12", "16"]
    assert [t.name for t in smaller_tiers(24 * GIB, ["12"])] == ["12"]
    with pytest.raises(SettingsError, match=r"tiers: expected of 8, 12, 16, below 24.0 GiB, got 80. Choose"):
        smaller_tiers(24 * GIB, ["12", "80"])
    with pytest.raises(SettingsError, match=r"expected of none, below 6.0 GiB, got none smaller"):
        smaller_tiers(6 * GIB)


def test_only_torch_backends_are_capped() -> None:
    assert emulate.torch_backends([]) == ("eager", "compiled")
    assert emulate.torch_backends(["compiled"]) == ["compiled"]
    with pytest.raises(SettingsError, match=r"expected of eager, compiled.*got 'onnxruntime'. A cap"):
        emulate.torch_backends(["eager", "onnxruntime"])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_without_a_gpu_it_says_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=f"on device {device}: expected a CUDA GPU.*without --run"):
        emulate.device_memory(device)


def test_what_fits_becomes_a_row_and_what_does_not_a_misfit(tmp_path: Path) -> None:
    recorder = Recorder("tiers", documents.environment(), tmp_path / "tiers.json")
    tried = list(walk(BASE, [tier("8")], ["eager"], [25], MadeUpGpu()))
    model = open_checkpoint("demo").model
    for one in tried:
        emulate.record(recorder, one, model)
    written = read_results(tmp_path / "tiers.json")
    assert [row.note for row in written.rows] == ["emulated cap 8 GB"] * 2
    assert {m.note for m in written.misfits} == {"emulated cap 8 GB"}
    assert [(m.setting.guidance, m.setting.networks, m.stopped_in) for m in written.misfits] == [
        ("batched", "resident", "denoiser"),
        ("batched", "swapped", "denoiser"),
        ("single", "resident", "vae_decoder"),
        ("single", "swapped", "vae_decoder"),
    ]
    assert written.warnings == ()
    broken = Tried(tier("8"), BASE, Answer(failed="exit code 1: boom"))
    emulate.record(recorder, broken, model)
    assert recorder.results().warnings == (f"emulated cap {broken}",)
    text = emulate.table(tried, "NVIDIA H200").text()
    assert "What fits under an emulated cap, on NVIDIA H200" in text
    assert sum("swapped" in line for line in text.splitlines()) == 4  # and the note
    assert any(line.split()[-4:] == ["6.00", "GiB", "1.00", "s"] for line in text.splitlines())


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
    assert attempt_videos(BASE, FakeEngine(steps, None, error)) == Answer(stopped_in=stage)  # type: ignore[arg-type]


def test_any_other_error_is_none() -> None:
    with pytest.raises(ValueError, match="boom"):
        attempt_videos(BASE, FakeEngine(2, ValueError("boom")))  # type: ignore[arg-type]


def test_a_row_says_what_ran() -> None:
    answer = attempt_videos(BASE, FakeEngine(2, None, None))  # type: ignore[arg-type]
    assert answer.row is not None
    assert answer.row.rewrites == ("a",)
    assert answer.row.latency_ms.runs == 1
    assert (answer.row.latency_ms.median, answer.row.first_call_ms) == (7.0, 7.0)
    assert (answer.row.peak_torch_bytes, answer.row.peak_host_bytes) == (11, 13)
    assert answer.row.setting.decode_chunk == 14


def test_a_fallback_is_never_measured() -> None:
    engine = FakeEngine(2, None, None, backend="compiled")
    with pytest.raises(BackendUnavailable, match="attempt with backend eager: expected every stage on eager"):
        attempt_videos(BASE, engine)  # type: ignore[arg-type]


SMALL = BASE.model_copy(
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
    failed = emulate.in_subprocess(SMALL.model_copy(update={"device": "cuda:7"}))
    assert not failed.fits
    assert failed.failed.startswith("exit code 1: ")
    assert "device cuda:7" in failed.failed


def test_the_cap_is_a_share_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(choose, "resolve", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=140 * GIB)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append((share, device))
    )
    open_engine(BASE.model_copy(update={"cap": 7 * GIB, "device": "cuda"}))
    assert asked == [(pytest.approx(0.05), torch.device("cuda", 0))]


def test_main_prints_the_answer_last(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["capped", BASE.model_dump_json()])
    monkeypatch.setattr(capped, "open_engine", lambda _: nullcontext(FakeEngine(2, None, None)))
    capped.main()
    assert Answer.model_validate_json(capsys.readouterr().out.splitlines()[-1]).fits


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpGpu]:
    gpu = MadeUpGpu()
    monkeypatch.setattr(emulate, "device_memory", lambda _: 20 * GIB)
    monkeypatch.setattr(choose, "resolve", lambda _: torch.device("cpu"))
    monkeypatch.setattr(emulate, "in_subprocess", gpu)
    monkeypatch.setattr(environment, "environment", lambda *_: documents.environment())
    return gpu


def test_the_command_writes_a_document(
    made_up_gpu: MadeUpGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(
        cli.main, "tiers", "--run", "--random-weights", "svd-xt", "--tiers", "12,16", "--backends", "eager",
        "--out", tmp_path / "out",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0
    assert (
        "12 GB, eager, 25 frames, batched guidance, decode chunk 25, networks resident: does not fit"
        in said.err
    )
    document = json.loads(said.out.splitlines()[-1])
    assert document == json.loads((tmp_path / "out" / "tiers.json").read_text())
    assert {row["note"] for row in document["rows"]} == {"emulated cap 12 GB", "emulated cap 16 GB"}
    assert {a.checkpoint for a in made_up_gpu.attempts} == {"random:svd-xt"}
    assert {(a.height, a.width, a.steps, a.repeat) for a in made_up_gpu.attempts} == {(576, 1024, 25, 3)}


def test_the_command_fails_when_an_attempt_broke(
    made_up_gpu: MadeUpGpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(emulate, "in_subprocess", lambda _: Answer(failed="exit code 1: boom"))
    assert call(cli.main, "tiers", "--run", "--random-weights", "svd", "--tiers", "8") == 1
    assert "boom" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiers", "8"], "without --run"),
        (["--run"], "--random-weights or --checkpoint"),
        (["--run", "--checkpoint", "svd", "--random-weights", "svd"], "--random-weights or --checkpoint"),
        (["--run", "--checkpoint", "svd", "--measured", "r.json"], "no --measured"),
        (["--run", "--checkpoint", "svd", "--frames", "14,x"], "--frames"),
        (["--run", "--checkpoint", "svd", "--frames", "0"], "--frames"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli.main, "tiers", *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_tiers_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli.main, "tiers", "--steps", "4") == 0
    assert "a video's latency (4 steps" in capsys.readouterr().out


def test_tried_reads_as_a_sentence() -> None:
    tried = Tried(tier("8"), BASE, Answer(stopped_in="vae_decoder"))
    assert str(tried) == (
        "8 GB, eager, 14 frames, batched guidance, decode chunk 14, networks resident: "
        "does not fit (vae_decoder)"
    )
