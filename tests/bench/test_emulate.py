"""Emulated tiers: the walk over attempts with a made-up GPU, and the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from svd_bench import cli
from svd_bench.cards.cards import TIERS, Tier
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import read_results
from svd_bench.measuring import environment
from svd_bench.memory import emulate
from svd_bench.memory.capped import Answer, Attempt
from svd_bench.memory.emulate import CUDA_CONTEXT, TierResult, smaller_tiers, try_tiers
from svd_engine.backends import choose
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import BackendUnavailable, SettingsError
from tests.bench import documents
from tests.bench.documents import GIB
from tests.bench.fakes import ATTEMPT
from tests.support.commands import call


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
    tried = list(try_tiers(ATTEMPT, [tier("8"), tier("16")], ["eager"], [25], gpu))
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
    list(try_tiers(ATTEMPT, [tier("16"), tier("40/48")], ["eager", "compiled"], [14, 25], gpu))
    assert {(a.backend, a.frames) for a in gpu.attempts} == {
        (backend, frames) for backend in ("eager", "compiled") for frames in (14, 25)
    }
    assert {(a.cap, a.note) for a in gpu.attempts} == {
        (16 * GIB - CUDA_CONTEXT, "emulated cap 16 GB"),
        (40 * GIB - CUDA_CONTEXT, "emulated cap 40 GB"),
    }
    assert {a.steps for a in gpu.attempts} == {ATTEMPT.steps}


def test_an_attempt_that_breaks_does_not_stop_the_walk() -> None:
    tried = list(
        try_tiers(ATTEMPT, [tier("8")], ["eager"], [14], lambda _: Answer(failed="exit code 1: boom"))
    )
    assert [t.verdict for t in tried] == ["failed: exit code 1: boom"] * 2  # both guidance modes


def test_chunks_are_smaller_than_the_frames() -> None:
    tried = list(try_tiers(ATTEMPT, [tier("8")], ["eager"], [4], lambda _: Answer(stopped_in="vae_decoder")))
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
    tried = list(try_tiers(ATTEMPT, [tier("8")], ["eager"], [25], MadeUpGpu()))
    model = open_checkpoint("demo").model
    for one in tried:
        emulate.record_result(recorder, one, model)
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
    broken = TierResult(tier("8"), ATTEMPT, Answer(failed="exit code 1: boom"))
    emulate.record_result(recorder, broken, model)
    assert recorder.results().warnings == (f"emulated cap {broken}",)
    text = emulate.tiers_table(tried, "NVIDIA H200").text()
    assert "What fits under an emulated cap, on NVIDIA H200" in text
    assert sum("swapped" in line for line in text.splitlines()) == 4  # and the note
    assert any(line.split()[-4:] == ["6.00", "GiB", "1.00", "s"] for line in text.splitlines())


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
    tried = TierResult(tier("8"), ATTEMPT, Answer(stopped_in="vae_decoder"))
    assert str(tried) == (
        "8 GB, eager, 14 frames, batched guidance, decode chunk 14, networks resident: "
        "does not fit (vae_decoder)"
    )
