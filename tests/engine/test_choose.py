"""A request is served as asked or refused; only `auto` chooses, and says why."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from svd_engine.backends import choose
from svd_engine.backends.choose import Choice, choose_for_checkpoint, resolve
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.install import install_line
from tests.support import damage, tensorrt_double

WITHOUT_PLANS: Any = SimpleNamespace(
    manifest=SimpleNamespace(plans=()), plans_command=lambda: "svd-export tensorrt 'my bundle'"
)


def choose_for_bundle(backend: str, device: str) -> Choice:
    return choose.choose_for_bundle(backend, device, WITHOUT_PLANS)


CHOOSERS = [choose_for_bundle, choose_for_checkpoint]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ORT_CUDA = "CUDAExecutionProvider"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes torch see GPUs, and onnxruntime have providers, that this machine may not have."""

    def see(count: int, *providers: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        listed = [*providers, "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)

    return see


def test_auto_without_a_gpu(gpu: Callable[..., None]) -> None:
    gpu(0)
    assert choose_for_bundle("auto", "auto") == Choice(
        "onnxruntime", CPU, "a bundle of ONNX graphs; torch sees no CUDA GPU"
    )
    assert choose_for_checkpoint("auto", "auto") == Choice(
        "eager", CPU, "no GPU: torch.compile would spend minutes on the CPU first"
    )


def test_auto_with_a_gpu(gpu: Callable[..., None]) -> None:
    gpu(1, ORT_CUDA)
    bundle, checkpoint = choose_for_bundle("auto", "auto"), choose_for_checkpoint("auto", "auto")
    assert (bundle.backend, bundle.device) == ("onnxruntime", CUDA)
    assert (checkpoint.backend, checkpoint.device) == ("compiled", CUDA)
    assert "a CUDA GPU" in checkpoint.reason
    assert bundle.reason == (
        "a bundle of ONNX graphs, and a CUDA GPU; no TensorRT plans (run: svd-export tensorrt 'my "
        "bundle'); torch.compile runs checkpoints only"
    )
    asked = choose_for_bundle("onnxruntime", "auto")
    assert asked == Choice("onnxruntime", CUDA, "a bundle of ONNX graphs, and a CUDA GPU")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_auto_prefers_plans(
    gpu: Callable[..., None], planned: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    gpu(1, ORT_CUDA)
    tensorrt_double.install(monkeypatch)
    choice = choose.choose_for_bundle("auto", device, Bundle(planned))
    assert choice == Choice("tensorrt", CUDA, "a CUDA GPU, and a TensorRT plan for it of every network")


def test_auto_says_which_network_has_no_plan(
    gpu: Callable[..., None], planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network is enough: stages are not mixed."""
    gpu(1, ORT_CUDA)
    tensorrt_double.install(monkeypatch)
    plan = Bundle(planned).manifest.plans[2]
    damage.edit(planned, lambda m: m["plans"][2]["target"].update(gpu="Other"))
    choice = choose.choose_for_bundle("auto", "auto", Bundle(planned))
    assert (choice.backend, choice.device) == ("onnxruntime", CUDA)
    assert choice.reason == (
        f"a bundle of ONNX graphs, and a CUDA GPU; no TensorRT plan of {plan.network}: {plan.file} built for "
        f"Other, here is NVIDIA Any 80GB (run: svd-export tensorrt {planned} --flavour tensorrt); "
        "torch.compile runs checkpoints only"
    )


def test_auto_with_plans_and_without_tensorrt(
    gpu: Callable[..., None], planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(1, ORT_CUDA)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    choice = choose.choose_for_bundle("auto", "auto", Bundle(planned))
    assert choice.backend == "onnxruntime"
    assert "; not backend tensorrt: expected the package tensorrt" in choice.reason
    assert install_line("tensorrt") in choice.reason


def test_tensorrt_asked_for(gpu: Callable[..., None]) -> None:
    """Opening it says what is missing; no other is taken in its place."""
    gpu(2)
    assert choose_for_bundle("tensorrt", "auto") == Choice("tensorrt", CUDA, "asked for")
    assert choose_for_bundle("tensorrt", "cuda:1") == Choice("tensorrt", torch.device("cuda", 1), "asked for")


@pytest.mark.parametrize(("device", "got"), [("auto", "none that torch can use"), ("cpu", "device cpu")])
def test_tensorrt_runs_on_no_cpu(gpu: Callable[..., None], device: str, got: str) -> None:
    gpu(0)
    with pytest.raises(BackendUnavailable, match=f"expected a CUDA GPU, got {got}") as caught:
        choose_for_bundle("tensorrt", device)
    assert 'backend="onnxruntime"' in caught.value.remedy


def test_auto_says_that_a_gpu_stays_idle(gpu: Callable[..., None]) -> None:
    gpu(1)
    choice = choose_for_bundle("auto", "auto")
    assert choice.device == CPU
    assert "the GPU stays idle" in choice.reason
    assert install_line("cuda") in choice.reason


def test_auto_without_onnxruntime(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert choose_for_bundle("auto", "auto").device == CPU  # opening it then says what to install


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_backend_asked_for_is_used(gpu: Callable[..., None], backend: str) -> None:
    gpu(2)
    assert choose_for_checkpoint(backend, "cuda:1") == Choice(backend, torch.device("cuda", 1), "asked for")
    assert choose_for_checkpoint(backend, "cpu") == Choice(backend, CPU, "asked for")
    assert choose_for_checkpoint(backend, "auto") == Choice(backend, CUDA, "asked for")


def test_a_device_asked_for_is_used(gpu: Callable[..., None]) -> None:
    """Even where opening it will then fail: no other is taken in its place."""
    gpu(1)
    automatic = choose_for_bundle("auto", "cuda")
    assert (automatic.backend, automatic.device) == ("onnxruntime", CUDA)
    assert choose_for_bundle("onnxruntime", "cuda") == Choice("onnxruntime", CUDA, "asked for")
    assert choose_for_bundle("auto", "cpu") == Choice("onnxruntime", CPU, "asked for")
    assert choose_for_bundle("onnxruntime", "cpu") == Choice("onnxruntime", CPU, "asked for")


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_torch_backends_run_no_bundle(backend: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        choose_for_bundle(backend, "cpu")
    assert (
        f"backend {backend} for a bundle: expected one of tensorrt, tensorrt-rtx, onnxruntime (a bundle"
        in str(caught.value)
    )
    assert f"VideoEngine.from_checkpoint(CHECKPOINT) to run {backend}" in caught.value.remedy


@pytest.mark.parametrize(("backend", "more"), [("onnxruntime", ", then"), ("tensorrt", " and `svd-export")])
def test_bundle_backends_run_no_checkpoint(backend: str, more: str) -> None:
    with pytest.raises(BackendUnavailable, match=f"svd-export onnx CHECKPOINT -o BUNDLE`{more}"):
        choose_for_checkpoint(backend, "cpu")


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_an_unknown_backend(chooser: Callable[[str, str], Choice]) -> None:
    expected = "backend: expected auto, tensorrt, tensorrt-rtx, onnxruntime, compiled, eager, got 'trt'"
    with pytest.raises(SettingsError, match=expected):
        chooser("trt", "cpu")


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cpu:0", "mps", "", "CPU"])
def test_an_unknown_device(chooser: Callable[[str, str], Choice], device: str) -> None:
    with pytest.raises(SettingsError, match=r"device: expected auto, .* or a torch\.device of these, got"):
        chooser("auto", device)


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1")])
def test_a_gpu_that_is_not_here(gpu: Callable[..., None], count: int, device: str) -> None:
    gpu(count)
    with pytest.raises(BackendUnavailable) as caught:
        resolve(device)
    assert f"device {device}: expected a CUDA GPU of this number" in str(caught.value)
    assert f"got {count} GPUs with torch" in str(caught.value)
    assert 'device="cpu"' in caught.value.remedy
