"""What `svd-engine info` says of a bundle and of a machine, with and without what it needs."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
import torch

from svd_engine import info
from svd_engine.bundle.flavours import Host, capability_target
from svd_engine.bundle.manifest import ParityEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.cli.info import _lines
from svd_engine.cli.main import main
from svd_engine.install import install_line
from svd_engine.spec.precision import Precision
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import damage, tensorrt_double, tensorrt_plans
from tests.support.commands import call


def rows(abilities: list[info.Ability]) -> dict[tuple[str, str], str]:
    return {(row.backend, row.device): row.why_not for row in abilities}


def test_a_bundle_in_words(tiny_bundle: Path) -> None:
    facts = info.bundle_facts(Bundle(tiny_bundle))
    profile = f"{FRAMES} frames, {HEIGHT}x{WIDTH}, batch 1, {{}} guidance, decode chunk {CHUNK}"
    assert facts["model"] == "tiny"
    assert facts["precision"] == "float32"
    assert facts["profile 1"] == profile.format("batched")
    assert facts["profile 2"] == profile.format("single")
    size = sum(path.stat().st_size for path in tiny_bundle.iterdir() if path.suffix in (".onnx", ".bin"))
    assert facts["size"].startswith(f"{size / 2**20:.1f} MiB in 10 files, ONNX opset 23")
    assert "single-token-cross-attention" in facts["rewrites"]
    assert "without" not in facts
    assert facts["parity"] == f"not verified; run: svd-export verify {tiny_bundle}"
    assert f"torch {version('torch')}" in facts["made with"]


def test_what_is_special_about_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    """Random weights, rewrites left out, and the worst row of its parity report."""

    def row(network: str, relative: float, tolerance: float) -> dict[str, object]:
        numbers = {"max_abs": 1.0, "relative": relative, "cosine": 1.0, "tolerance": tolerance}
        return ParityEntry(network=network, output="out", backend="ort cpu", **numbers).model_dump()

    folder = damage.copy(tiny_bundle, tmp_path)
    damage.edit(folder, lambda m: m["model"].update(random_weights=True))
    damage.edit(folder, lambda m: m.update(rewrites=[], without_rewrites=["fused-qkv"]))
    damage.edit(folder, lambda m: m.update(parity=[row("a", 1e-3, 1e-1), row("b", 5e-5, 1e-4)]))
    facts = info.bundle_facts(Bundle(folder))
    assert facts["model"] == "tiny with random weights"
    assert (facts["rewrites"], facts["without"]) == ("none", "fused-qkv")
    assert facts["parity"] == "worst 5e-05 of 0.0001 allowed (b, ort cpu)"


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    missing = info.machine_facts()["GPU"]
    assert "built without CUDA" in missing
    assert "pip install --force-reinstall torch" in missing
    able = rows(info.abilities())
    assert able["eager", "cpu"] == able["onnxruntime", "cpu"] == ""
    assert able["eager", "cuda"] == able["compiled", "cuda"] == missing
    assert install_line("cuda") in able["onnxruntime", "cuda"]


@pytest.mark.parametrize(("platform", "advice"), [("win32", "pytorch.org"), ("darwin", "none for macOS")])
def test_where_pip_brings_no_cuda_build(monkeypatch: pytest.MonkeyPatch, platform: str, advice: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", platform)
    missing = info.machine_facts()["GPU"]
    assert advice in missing
    assert "pip install" not in missing


def test_names_and_values_stay_apart(capsys: pytest.CaptureFixture[str]) -> None:
    _lines({"GPU": "a", "a name longer than the column": "b"})
    assert capsys.readouterr().out == "GPU             a\na name longer than the column  b\n"


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA Any", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setenv("CXX", sys.executable)  # something that is installed
    tensorrt_double.install(monkeypatch)
    assert info.machine_facts()["GPU 1"] == "NVIDIA Any, 80.0 GiB, sm90"
    assert set(rows(info.abilities()).values()) == {""}
    assert rows(info.bundle_abilities(Precision.of("bfloat16")))["onnxruntime", "cuda"] == ""


def test_a_gpu_whose_driver_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch, and onnxruntime-gpu, on a machine without a driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    assert "nvidia-smi" in info.machine_facts()["GPU"]
    assert "nvidia-smi" in rows(info.bundle_abilities(Precision.of("float16")))["onnxruntime", "cuda"]


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    able = rows(info.bundle_abilities(Precision.of("float32")))
    assert install_line("cpu") in able["onnxruntime", "cpu"]
    assert install_line("cuda") in able["onnxruntime", "cuda"]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    why_not = rows(info.abilities())["compiled", "cpu"]
    assert "no C++ compiler no-such-compiler" in why_not
    assert "apt-get install g++" in why_not


def test_bfloat16_is_nothing_for_onnx_runtime_on_the_cpu() -> None:
    assert "in fp32" in rows(info.bundle_abilities(Precision.of("bfloat16")))["onnxruntime", "cpu"]
    assert rows(info.bundle_abilities(Precision.of("float16")))["onnxruntime", "cpu"] == ""


@pytest.fixture
def planned(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with three plans: for this card, for another, and a stripped one for a capability."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    clip, vae, denoiser, *_ = tensorrt_plans.specs(folder)
    tensorrt_plans.add_plan(folder, clip)
    other = Host("tensorrt", "10.15.1.29", "Other", (8, 6))
    tensorrt_plans.add_plan(folder, vae, host=other)
    tensorrt_plans.add_plan(
        folder,
        denoiser,
        tensorrt_plans.plan_of(denoiser, 3 * 2**20, {}),
        target=capability_target(((9, 0),)),
        stripped=True,
    )
    return folder


def test_plans_on_a_machine_that_runs_some(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    tensorrt_double.install(monkeypatch)
    first, second, third = info.plan_facts(Bundle(planned)).values()
    assert first == (
        "image_encoder-b1 (profile 1, 2), TensorRT 10.14.1.48, for NVIDIA Any 80GB only, sm90, "
        "float16, 0.0 MiB, on the GPU 0.0 MiB of activations; runs on cuda:0, cuda:1"
    )
    assert second.endswith(
        f"; not here: built by TensorRT 10.15.1.29, here is 10.14.1.48; "
        f"run: svd-export tensorrt {planned} --flavour tensorrt"
    )
    assert "(profile 1), TensorRT" in third
    assert "for sm90, " in third
    assert "MiB without weights, on the GPU 3.0 MiB of activations; runs on cuda:0, cuda:1" in third
    why_not = info.plan_abilities(Bundle(planned))[0].why_not
    assert why_not.startswith(f"no TensorRT plan of {Bundle(planned).manifest.plans[1].network}: ")
    assert "vae_decoder-t2-32x48: no plan" in why_not


def test_plans_on_a_machine_without_tensorrt(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    facts = info.plan_facts(Bundle(planned))
    assert len(facts) == 3
    assert all(fact.endswith(f"; run: {install_line('tensorrt')}") for fact in facts.values())
    assert install_line("tensorrt") in info.plan_abilities(Bundle(planned))[0].why_not


def test_plans_on_a_machine_without_a_gpu(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    tensorrt_double.install(monkeypatch)
    facts = info.plan_facts(Bundle(planned))
    assert all(fact.endswith("; not here: torch sees no CUDA GPU") for fact in facts.values())
    assert "nvidia-smi" in info.plan_abilities(Bundle(planned))[0].why_not


def test_the_command_lists_plans(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "info", planned) == 0
    said = capsys.readouterr().out
    assert "plan 1          image_encoder-b1 (profile 1, 2), TensorRT 10.14.1.48" in said
    assert "\ntensorrt on cuda: " in said
