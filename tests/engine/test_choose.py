"""A request is served as asked or refused; only `auto` chooses, and says why."""

from __future__ import annotations

import sys
from collections.abc import Callable

import onnxruntime
import pytest
import torch

from svd_engine.backends.choose import Choice, choose_for_bundle, choose_for_checkpoint, resolve
from svd_engine.errors import BackendUnavailable, SettingsError

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
    assert "a CUDA GPU" in bundle.reason
    assert "a CUDA GPU" in checkpoint.reason


def test_auto_says_that_a_gpu_stays_idle(gpu: Callable[..., None]) -> None:
    gpu(1)
    choice = choose_for_bundle("auto", "auto")
    assert choice.device == CPU
    assert "the GPU stays idle" in choice.reason
    assert "pip install 'svd-engine[cuda]'" in choice.reason


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
    assert choose_for_bundle("auto", "cuda") == Choice("onnxruntime", CUDA, "asked for")
    assert choose_for_bundle("onnxruntime", "cpu") == Choice("onnxruntime", CPU, "asked for")


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_torch_backends_run_no_bundle(backend: str) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        choose_for_bundle(backend, "cpu")
    assert f"backend {backend} for a bundle: expected onnxruntime" in str(caught.value)
    assert f"--checkpoint CHECKPOINT to run {backend}" in caught.value.remedy


def test_onnxruntime_runs_no_checkpoint() -> None:
    with pytest.raises(BackendUnavailable, match="svd-export onnx CHECKPOINT -o BUNDLE"):
        choose_for_checkpoint("onnxruntime", "cpu")


@pytest.mark.parametrize("choose", CHOOSERS)
def test_an_unknown_backend(choose: Callable[[str, str], Choice]) -> None:
    with pytest.raises(
        SettingsError, match="backend: expected auto, onnxruntime, compiled, eager, got 'trt'"
    ):
        choose("trt", "cpu")


@pytest.mark.parametrize("choose", CHOOSERS)
@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cpu:0", "mps", "", "CPU"])
def test_an_unknown_device(choose: Callable[[str, str], Choice], device: str) -> None:
    with pytest.raises(SettingsError, match="device: expected auto, cpu, cuda or cuda:N, got"):
        choose("auto", device)


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1")])
def test_a_gpu_that_is_not_here(gpu: Callable[..., None], count: int, device: str) -> None:
    gpu(count)
    with pytest.raises(BackendUnavailable) as caught:
        resolve(device)
    assert f"device {device}: expected a CUDA GPU of this number" in str(caught.value)
    assert f"got {count} GPUs with torch" in str(caught.value)
    assert "--device cpu" in caught.value.remedy
