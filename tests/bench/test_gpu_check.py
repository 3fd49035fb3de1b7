"""The GPU check on a CPU: every stage at tiny size, and what becomes of one that fails or hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import onnxruntime as runtime
import pytest
import torch

from svd_bench import cli
from svd_bench.commands.arguments import names
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import read_results
from svd_bench.gpu.check import (
    REHEARSAL,
    OutOfTime,
    check_gpu,
    deadline,
    describe_device,
    run_stage,
    run_stages,
)
from svd_bench.gpu.context import Context, DeviceWeights, Skipped
from svd_bench.gpu.stage import Findings, GpuStage
from svd_bench.gpu.stages import GPU_STAGES, onnxruntime
from svd_bench.measuring.timing import timer_for
from svd_bench.subjects.cases import Case
from svd_engine.checkpoint.random_weights import statistics
from tests.bench import documents
from tests.support.commands import call

CPU = torch.device("cpu")


def context() -> Context:
    return Context(
        CPU, None, timer_for(CPU), Recorder("gpu-check", documents.environment()), lambda line: None
    )


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """As on a machine that has only the checkout.  Compiling is switched off: it would take minutes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "svd_bench.gpu_check", "--out", str(tmp_path / "out"), "--rehearse"],
        env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{REHEARSAL}no CUDA GPU")
    progress = [line for line in done.stderr.splitlines() if re.search(r"\[ *\d+\.\d s\]", line)]
    assert progress
    assert all(line.startswith(REHEARSAL.rstrip()) for line in lines + progress)
    results = read_results(tmp_path / "out" / "gpu-check.json")
    assert results.rehearsal
    expected = {stage.name: "skipped" if "TensorRT" in stage.name else "passed" for stage in GPU_STAGES}
    assert {o.stage: o.status for o in results.outcomes} == expected
    assert list(expected) == [o.stage for o in results.outcomes]
    skipped = [o.why for o in results.outcomes if o.status == "skipped"]
    missing = "tensorrt cannot be used here: No module named 'tensorrt'. Run: pip install"
    beginnings = (missing, "TensorRT for RTX runs on a CUDA GPU", missing)
    assert [why.startswith(begins) for why, begins in zip(skipped, beginnings, strict=True)] == [True] * 3
    assert results.ceiling is not None
    assert {row.stage for row in results.rows} == {
        "image_encoder", "vae_encoder", "denoiser_step", "vae_decoder", "whole_video"
    }  # fmt: skip
    assert {(row.subject, row.backend) for row in results.rows} == {
        ("diffusers", "eager"), ("diffusers-compile", "torch.compile"),
        ("svd-engine", "eager"), ("svd-engine", "compiled"),
    }  # fmt: skip
    profiles = {o.stage: o.lines for o in results.outcomes if o.stage.startswith("kernels")}
    assert all("convolution" in "".join(lines) for lines in profiles.values())
    assert lines[-1].startswith(f"{REHEARSAL}skipped TensorRT at full size")


def test_without_a_gpu_it_says_so_and_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        assert call(cli.main, "gpu-check", "--out", tmp_path / "out", "--device", device) == 1
        printed = capsys.readouterr()
        assert printed.out.startswith("no CUDA GPU")
        assert printed.out.count("\n") == 1
        assert "gpu-check: expected a CUDA GPU that torch can use, got device cpu" in printed.err
        assert "--rehearse" in printed.err
    assert not (tmp_path / "out").exists()
    assert call(cli.main, "gpu-check", "--out", tmp_path, "--device", "cuda", "--rehearse") == 2
    assert "--rehearse runs on the CPU" in " ".join(capsys.readouterr().err.split())


def test_what_was_found_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert describe_device(CPU, None).startswith("no CUDA GPU: this torch is built without CUDA; torch ")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert describe_device(CPU, None).startswith(
        "no CUDA GPU: torch sees none, is the NVIDIA driver installed?"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert describe_device(CPU, None).startswith("no CUDA GPU in use: device cpu was asked for")
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 * documents.GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    line = describe_device(torch.device("cuda"), None)
    assert line.startswith("GPU: NVIDIA H200, 140 GiB, compute capability 9.0, driver unknown, CUDA ")
    assert f"torch {torch.__version__}" in line


def failing(error: BaseException) -> GpuStage:
    def stage(_: Context) -> Findings:
        raise error

    return GpuStage("it", 0, stage)


def test_what_a_stage_finds_is_kept() -> None:
    outcome = run_stage(context(), GpuStage("it", 0, lambda _: Findings({"a": "b"}, ("c",))), lambda: 100.0)
    assert (outcome.status, outcome.facts, outcome.lines) == ("passed", {"a": "b"}, ("c",))


def test_a_failure_is_recorded_with_its_traceback_and_the_next_stage_runs() -> None:
    here = context()
    stages = [failing(ValueError("no such thing\nat all")), GpuStage("next", 0, lambda _: Findings())]
    run_stages(here, stages, lambda: 100.0, lambda line: None)
    first, second = here.recorder.results().outcomes
    assert (first.status, first.why) == ("failed", "ValueError: no such thing")
    assert any("test_gpu_check.py" in line for line in first.lines)
    assert second.status == "passed"


def test_a_stage_that_cannot_run_says_why() -> None:
    outcome = run_stage(context(), failing(Skipped("no CUDA provider")), lambda: 100.0)
    assert (outcome.status, outcome.why) == ("skipped", "no CUDA provider")


def test_onnxruntime_without_a_provider_or_an_exporter_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    here = context()
    here.full = True  # so that it wants CUDA, which this onnxruntime has not
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Skipped, match="has no CUDAExecutionProvider, only CPUExecutionProvider"):
        onnxruntime(here)
    monkeypatch.setitem(sys.modules, "svd_export.to_onnx", None)
    with pytest.raises(Skipped, match="exporting or running needs what is not installed"):
        onnxruntime(here)


def test_a_stage_is_not_begun_without_time_for_it() -> None:
    here = context()
    here.full = True
    outcome = run_stage(here, GpuStage("it", 60, lambda _: Findings()), lambda: 69.0)
    assert (outcome.status, outcome.why) == ("skipped", "69 s were left, it needs about 60")


def test_a_stage_that_takes_too_long_is_stopped() -> None:
    def hang(_: Context) -> Findings:
        try:
            time.sleep(60)
        except Exception:  # a library that swallows what it does not know
            time.sleep(60)
        return Findings()

    started = time.monotonic()
    outcome = run_stage(context(), GpuStage("it", 0, hang), lambda: 10.2 - (time.monotonic() - started))
    assert outcome.status == "failed"
    assert "the time was over" in outcome.why
    assert time.monotonic() - started < 30


def test_the_deadline_gives_back_the_timer_that_it_took() -> None:
    def later(*_: object) -> None:
        raise AssertionError("too early")

    before = signal.signal(signal.SIGALRM, later)
    was, _ = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with pytest.raises(OutOfTime), deadline(0.01):
            time.sleep(10)
        assert signal.getsignal(signal.SIGALRM) is later
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, was)
        signal.signal(signal.SIGALRM, before)


def test_exit_code_and_document_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_gpu(tmp_path, "auto", 100, [], ["x"], [failing(ValueError("no"))], rehearse=True) == 1
    printed = capsys.readouterr().out
    assert "failed  it" in printed
    assert read_results(tmp_path / "gpu-check.json").outcomes[0].why == "ValueError: no"


def test_only_some_stages(tmp_path: Path) -> None:
    ran: list[str] = []

    def stage(name: str) -> GpuStage:
        return GpuStage(name, 0, lambda _: ran.append(name) or Findings())

    check_gpu(tmp_path, "auto", 100, ["c"], ["x"], [stage("a"), stage("b"), stage("c")], rehearse=True)
    assert ran == ["a", "c"]  # the first is the ceiling, which the others need


def test_without_a_ceiling_nothing_is_held_against_it() -> None:
    here = context()
    with pytest.raises(Skipped, match="the ceiling"):
        here.contest("vae_decoder", here.setting(), [here.subject("svd-engine", "eager")], 1)


def test_weights_drawn_on_the_device_have_the_statistics_of_the_others() -> None:
    expected = {"a.weight": (64, 32, 3, 3), "norm.weight": (50_000,), "b.mix_factor": (1,)}
    drawn = DeviceWeights(CPU).tensors("unet", expected, torch.float32)
    again = DeviceWeights(CPU).tensors("unet", {"a.weight": (64, 32, 3, 3)}, torch.float32)
    assert torch.equal(drawn["a.weight"], again["a.weight"])
    for name in ("a.weight", "norm.weight"):
        mean, deviation = statistics(name, expected[name])
        assert float(drawn[name].mean()) == pytest.approx(mean, abs=0.01)
        assert float(drawn[name].std()) == pytest.approx(deviation, rel=0.02)
    assert next(DeviceWeights(CPU).identity("vae")) == b"random weights drawn on cpu"


def test_weights_are_counted_once_whoever_shares_them() -> None:
    here = context()
    setting = here.setting()
    ours, theirs = here.subject("svd-engine", "eager"), here.subject("diffusers", "eager")

    def held(stage: str, of: str) -> int:
        running = here.open_case(Case(subject=ours if of == "ours" else theirs, stage=stage, setting=setting))
        running()
        return sum(tensor.numel() for tensor in here.weights_of(running))

    networks = [held(stage, "theirs") for stage in ("image_encoder", "denoiser_step")]
    assert all(count > 0 for count in networks)
    pipeline = held("whole_video", "theirs")
    assert pipeline > sum(networks)
    unet = here.checkpoint.load("unet", torch.float32)
    assert networks[1] == sum(parameter.numel() for parameter in unet.parameters())
    assert held("vae_decoder", "ours") > 0
    assert held("whole_video", "ours") > held("denoiser_step", "ours")


def test_every_stage_can_be_asked_for_by_its_name() -> None:
    assert [name for stage in GPU_STAGES for name in names(stage.name)] == [
        stage.name for stage in GPU_STAGES
    ]
