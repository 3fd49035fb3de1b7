"""Every way in which TensorRT can fail: our error, TensorRT's words in it, and what to do."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.backends.tensorrt.network import TrtBackend
from svd_engine.bundle.flavours import AMPERE_AND_NEWER
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BackendUnavailable, BundleError, TensorMismatch
from svd_engine.install import install_line
from svd_engine.networks.parity import example_inputs
from tests.support import damage, tensorrt_double
from tests.support.tensorrt_double import Fault, TensorRT
from tests.support.tensorrt_plans import HOST, add_plan, denoiser, plan_of

CPU = torch.device("cpu")
NO_MEMORY = "[executionContext.cpp] Error Code 2: OutOfMemory (requested size was 86 GB)"


@pytest.fixture
def folder(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose denoiser has a plan."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    add_plan(folder, denoiser(folder))
    return folder


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    double = tensorrt_double.install(monkeypatch)
    double.compute = lambda key, inputs: {"denoised": torch.zeros(inputs["x"].shape)}
    return double


def refusal(folder: Path, calls: int = 0, kind: type[BackendError] = BackendError) -> BackendError:
    """Of opening the denoiser, or of its last call."""
    backend, spec = TrtBackend(Bundle(folder), CPU), denoiser(folder)
    if not calls:
        with pytest.raises(kind) as caught:
            backend.open(spec)
        return caught.value
    network = backend.open(spec)
    for _ in range(calls - 1):
        network(**example_inputs(spec))
    with pytest.raises(kind) as caught:
        network(**example_inputs(spec))
    return caught.value


def test_tensorrt_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendUnavailable, match=re.escape(install_line("tensorrt"))):
        TrtBackend(Bundle(folder), CPU)


def test_no_plan_fits(folder: Path, trt: TensorRT) -> None:
    """Nothing is deserialised: a plan of another machine is not even read."""
    damage.edit(folder, lambda manifest: manifest["plans"][0]["target"].update(gpu="Other"))
    error = refusal(folder, kind=BackendUnavailable)
    assert error.got.endswith(f"built for Other, here is {HOST.gpu}")
    assert error.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt"
    assert trt.calls == []


def test_an_altered_plan_is_not_deserialised(folder: Path, trt: TensorRT) -> None:
    damage.flip(folder / Bundle(folder).manifest.plans[0].file)
    with pytest.raises(BundleError, match="expected sha256"):
        TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert trt.called("Runtime.deserialize_cuda_engine") == []


def test_no_runtime(folder: Path, trt: TensorRT) -> None:
    raised = TypeError("pybind11::init(): factory function returned nullptr")
    trt.faults["Runtime.__init__"] = Fault(raises=raised, says="CUDA initialization failure with error: 35")
    error = refusal(folder, kind=BackendUnavailable)
    assert error.got == "CUDA initialization failure with error: 35"
    assert "nvidia-smi" in error.remedy


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("Runtime.deserialize_cuda_engine", "an engine"),
        ("ICudaEngine.create_execution_context", "an execution context"),
    ],
)
@pytest.mark.parametrize("says", ["Error Code 4: version", NO_MEMORY, ""], ids=["version", "memory", "none"])
def test_what_loading_gives_nothing(folder: Path, trt: TensorRT, call: str, expected: str, says: str) -> None:
    trt.faults[call] = Fault(returns=None, says=says)
    error = refusal(folder)
    plan = Bundle(folder).manifest.plans[0].file
    assert f"TensorRT 10.14.1.48 loading {plan} on cpu: expected {expected}, got " in str(error)
    assert error.got == (says or "no word from TensorRT's log")
    if says == NO_MEMORY:
        assert "Free the GPU's memory, or export a smaller profile (a smaller decode chunk" in error.remedy
    else:
        assert error.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt"


Row = dict[str, Any]
TABLES: dict[str, tuple[str, dict[str, Row | None]]] = {
    "a missing tensor": ("guidance float32 [1, 3], input time_ids", {"sigma": None}),
    "another name": ("input noise float32 []", {"noise": {"shape": []}, "sigma": None}),
    "one too many": ("input more float32 [2]", {"more": {"shape": [2]}}),
    "another type": ("input sigma float16 []", {"sigma": {"dtype": "HALF"}}),
    "a type of which we know nothing": ("input sigma INT64 []", {"sigma": {"dtype": "INT64"}}),
    "another shape": ("input embedding float32 [2, 1, 32]", {"embedding": {"shape": [2, 1, 32]}}),
    "a dynamic shape": ("input time_ids float32 [-1, 3]", {"time_ids": {"shape": [-1, 3]}}),
    "an output for an input": ("output sigma float32 []", {"sigma": {"mode": "OUTPUT"}}),
    "a tensor on the host": ("input sigma float32 [] on the host", {"sigma": {"location": "HOST"}}),
}


@pytest.mark.parametrize(("got", "change"), TABLES.values(), ids=TABLES)
def test_a_plan_with_another_table(
    folder: Path, trt: TensorRT, got: str, change: dict[str, Row | None]
) -> None:
    """The plan is what the manifest hashed, and yet is not of this network: nothing is bound."""
    spec = denoiser(folder)
    plan = plan_of(spec)
    for name, row in change.items():
        if row is None:
            del plan["tensors"][name]
        else:
            plain = {"mode": "INPUT", "dtype": "FLOAT", "location": "DEVICE"}
            plan["tensors"][name] = {**plain, **plan["tensors"].get(name, {}), **row}
    damage.edit(folder, lambda manifest: manifest.update(plans=[]))
    file = add_plan(folder, spec, plan).file
    error = refusal(folder)
    assert f"tensors of {file}: expected input embedding float32 [1, 1, 32], input first_latent" in str(error)
    assert got in error.got
    assert got not in error.expected
    assert error.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt"
    assert trt.called("IExecutionContext.set_tensor_address", "cuda.empty") == []


def test_a_buffer_that_is_refused(folder: Path, trt: TensorRT) -> None:
    trt.faults["IExecutionContext.set_tensor_address"] = Fault(returns=False, says="not 256-byte aligned")
    error = refusal(folder)
    assert f"TensorRT, {denoiser(folder).key} on cpu: expected a buffer for x, got not 256-byte" in str(error)
    assert "Report this" in error.remedy


@pytest.mark.parametrize(
    ("says", "remedy"),
    [("illegal memory access", "Report this"), (NO_MEMORY, "export a smaller profile")],
    ids=["access", "memory"],
)
def test_a_launch_that_fails(folder: Path, trt: TensorRT, says: str, remedy: str) -> None:
    trt.faults["IExecutionContext.execute_async_v3"] = Fault(returns=False, says=says)
    error = refusal(folder, calls=1)
    assert f"TensorRT, {denoiser(folder).key} on cpu: expected a launch without error, got {says}" in str(
        error
    )
    assert remedy in error.remedy


def test_a_launch_that_failed_can_be_tried_again(folder: Path, trt: TensorRT) -> None:
    """It was not counted as the first one: recording still waits for a launch that worked."""
    network = TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    inputs = example_inputs(network.spec)
    trt.faults["IExecutionContext.execute_async_v3"] = Fault(returns=False)
    with pytest.raises(BackendError):
        network(**inputs)
    trt.faults.clear()
    network(**inputs)
    assert trt.called("cuda.capture") == []


def test_a_launch_that_cannot_be_recorded(folder: Path, trt: TensorRT) -> None:
    """Found on the second call; nothing is launched in its place."""
    network = TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    inputs = example_inputs(network.spec)
    network(**inputs)
    trt.faults["IExecutionContext.execute_async_v3"] = Fault(returns=False, says="not while capturing")
    with pytest.raises(BackendError, match=r"expected a CUDA graph of its launch, got not while capturing\."):
        network(**inputs)
    trt.faults = {"cuda.capture": Fault(raises=RuntimeError("CUDA error: operation not permitted"))}
    with pytest.raises(BackendError, match=r"got no word .* log \(CUDA error: operation not permitted\)"):
        network(**inputs)
    assert trt.called("cuda.replay") == []


@pytest.mark.parametrize("what", ["x of", "denoised of", "TensorRT's activations"])
def test_no_memory_for_a_buffer(folder: Path, trt: TensorRT, what: str) -> None:
    """Whose error `Cuda.empty` makes of torch's; see test_trt_cuda."""

    class Full(tensorrt_double.CudaDouble):
        def empty(self, wanted: str, *arguments: Any) -> torch.Tensor:
            if wanted.startswith(what):
                raise BackendError(
                    "GPU memory of cpu", expected=f"room for {wanted}", got="none", remedy="Free."
                )
            return super().empty(wanted, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svd_engine.backends.tensorrt.network.Cuda", lambda device: Full(trt, device))
        error = refusal(folder, calls=1 if "activations" in what else 0)
    assert error.expected.startswith(f"room for {what}")
    assert trt.called("IExecutionContext.execute_async_v3") == []


def test_a_wrong_input_never_reaches_a_buffer(folder: Path, trt: TensorRT) -> None:
    network = TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    inputs = example_inputs(network.spec)
    with pytest.raises(TensorMismatch, match="input 'x' of denoiser"):
        network(**{**inputs, "x": inputs["x"].half()})
    assert trt.called("IExecutionContext.execute_async_v3") == []


def test_a_plan_that_only_newer_cards_run(
    folder: Path, trt: TensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.edit(folder, lambda manifest: manifest.update(plans=[]))
    add_plan(folder, denoiser(folder), host=replace(HOST, gpu="Other"), target=AMPERE_AND_NEWER)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "built for sm80 or newer, here is sm75" in refusal(folder, kind=BackendUnavailable).got
