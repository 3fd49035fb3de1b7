"""The TensorRT stages of the GPU check over the recording double, which computes what eager torch does."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_bench.gpu import stage as gpu_stage
from svd_bench.gpu import tensorrt_stages as gpu_tensorrt
from svd_bench.gpu.context import Context, Skipped, tiny_checkpoint
from svd_bench.subjects.cases import profile_of
from svd_engine.backends.choose import Choice
from svd_engine.bundle.flavours import TENSORRT_RTX
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import BackendError
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import TOLERANCES
from svd_engine.spec.network import named_outputs
from svd_engine.spec.precision import FLOAT32, Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_export.to_onnx import export_bundle
from tests.bench.fakes import CEILING
from tests.bench.test_gpu_check import context
from tests.support import tensorrt_builder_double, tensorrt_double
from tests.support.tensorrt_double import Fault

TINY = Profile(2, 32, 32, decode_chunk=2)  # of every context on a CPU
NETWORKS = ("image_encoder", "vae_encoder", "vae_decoder", "denoiser")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """`export_bundle` that exports each profile once."""
    done: dict[Profile, Path] = {}

    def export(checkpoint: Checkpoint, folder: Path, profiles: list[Profile], *more: Any) -> None:
        (profile,) = profiles
        if profile not in done:
            done[profile] = tmp_path_factory.mktemp("exported") / "bundle"
            export_bundle(checkpoint, done[profile], profiles, *more)
        shutil.copytree(done[profile], folder)

    return export


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, exports: Callable[..., None]) -> Any:
    """The double, on a CPU that `from_bundle` takes for a GPU."""
    monkeypatch.setattr("svd_export.to_onnx.export_bundle", exports)
    for module in (gpu_stage, gpu_tensorrt):  # so that one export serves every test
        monkeypatch.setattr(module, "SMALL", TINY)
    choice = Choice("tensorrt", torch.device("cpu"), "asked for")
    monkeypatch.setattr("svd_engine.residency.source.choose_for_bundle", lambda *_: choice)
    return tensorrt_builder_double.install(monkeypatch)


def computing(modules: Modules, profile: Profile, precision: Precision = FLOAT32) -> Any:
    """What the engines of a profile compute, by their keys."""
    specs = {spec.key: spec for spec in specs_of(profile, modules.checkpoint.model.architecture, precision)}

    def compute(key: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return named_outputs(specs[key], modules.network(specs[key])(**inputs))

    return compute


def test_small_networks(trt: Any) -> None:
    trt.compute = computing(Modules(tiny_checkpoint()), TINY)
    facts = gpu_tensorrt.small(context()).facts
    assert [name.split()[0] for name in facts] == [
        "image_encoder",
        "vae_encoder",
        "denoiser",
        "vae_decoder",
        "whole",
    ]
    assert all(float(found.split()[0]) < 1e-4 for found in facts.values())
    allowed = {name: TOLERANCES[name.split()[1]] for name in facts if name != "whole video"}
    assert [name.split()[1] for name in allowed] == ["float16", "float32", "float16", "float16"]
    assert all(f"(allowed {figure:g})" in facts[name] for name, figure in allowed.items())
    assert len(trt.called("Builder.build_serialized_network")) == 4


def network_of(here: Context) -> Any:
    """What the engines of a context's own setting compute."""
    assert profile_of(here.setting()) == TINY
    return computing(here.modules, TINY, Precision.of(here.dtype))


def prepared() -> Context:
    """In half precision, as on a GPU, with a ceiling, which stages are held against."""
    here = context()
    here.dtype = "float16"
    here.recorder.ceiling = CEILING
    return here


def test_full_size(trt: Any) -> None:
    here = prepared()
    trt.compute = network_of(here)
    facts = gpu_tensorrt.full_size(here).facts
    for network in NETWORKS:
        assert facts[f"{network}: plan"].endswith("MiB, activations 0 MiB")
        assert {f"{network}: build", f"{network}: allowed"} <= facts.keys()
    rows = [row for row in here.recorder.results().rows if row.backend == "tensorrt"]
    assert [row.stage for row in rows] == [gpu_tensorrt.STAGE_OF_NETWORK[network] for network in NETWORKS]
    for row in rows:
        assert row.max_abs_difference is not None
        assert row.max_abs_difference < 1e-4
        assert row.first_call_ms is not None
    unet = next(row for row in rows if row.stage == "denoiser_step")
    assert "single-token-cross-attention" in unet.rewrites
    assert len(trt.called("IExecutionContext.freed")) == 4  # each network goes before the next is built
    assert "tensorrt" not in {subject.backend for subject in here._backends}


def test_a_wrong_network_is_found_and_what_was_before_it_kept(trt: Any) -> None:
    here = prepared()
    right = network_of(here)

    def off(key: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        factor = 1.5 if key.startswith("vae_decoder") else 1
        return {name: tensor * factor for name, tensor in right(key, inputs).items()}

    trt.compute = off
    with pytest.raises(BackendError, match="output of vae_decoder"):
        gpu_tensorrt.full_size(here)
    rows = [row.stage for row in here.recorder.results().rows if row.backend == "tensorrt"]
    assert rows == ["image_encoder", "vae_encoder"]
    assert len(trt.called("IExecutionContext.freed")) == 3


def test_a_build_that_fails(trt: Any) -> None:
    trt.faults["Builder.build_serialized_network"] = Fault(returns=None, says="out of memory")
    with pytest.raises(Exception, match="expected a plan, got out of memory"):
        gpu_tensorrt.small(context())


@pytest.mark.parametrize("stage", [gpu_tensorrt.small, gpu_tensorrt.full_size])
@pytest.mark.parametrize("absent", ["tensorrt", "svd_export.to_onnx"])
def test_without_it_the_stage_is_skipped(
    stage: Any, absent: str, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(Skipped, match=r"tensorrt cannot be used here|exporting needs what is not installed"):
        stage(context())


def test_graphs_are_exported_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 bundles hold no graphs for TensorRT."""
    seen: list[Any] = []
    monkeypatch.setattr("svd_export.to_onnx.export_bundle", lambda *arguments: seen.append(arguments))
    with gpu_tensorrt.exported_bundle(context(), tiny_checkpoint(), TINY):
        pass
    assert seen[0][3] is torch.float16


def test_rtx_has_no_target_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch, "1.7.0.1", TENSORRT_RTX, (9, 0))
    with pytest.raises(Skipped, match="TensorRT for RTX runs on a CUDA GPU"):
        gpu_tensorrt.small_rtx(context())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Skipped, match="TensorRT for RTX has no SM90 target"):
        gpu_tensorrt.small_rtx(context())


def test_rtx_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(Skipped, match="tensorrt-rtx cannot be used here"):
        gpu_tensorrt.small_rtx(context())


def test_rtx_plans_are_built_in_a_process_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(gpu_tensorrt.subprocess, "run", lambda command, check: commands.append(command))
    gpu_tensorrt.build(tmp_path, TENSORRT_RTX, context())
    (command,) = commands
    assert command[3:] == ["tensorrt", str(tmp_path), "--flavour", "tensorrt-rtx", "--target", "here"]
