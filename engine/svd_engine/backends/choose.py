"""Which backend and device a request means here.  Only `auto` chooses, and it says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from svd_engine.backends.ort import PROVIDERS
from svd_engine.backends.trt_library import machine
from svd_engine.bundle import Bundle
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.install import install_line
from svd_engine.plans import build_command, refusal

BackendName = Literal["auto", "tensorrt", "onnxruntime", "compiled", "eager"]
DeviceName = str | torch.device  # "auto", "cpu", "cuda", "cuda:1"


@dataclass(frozen=True)
class Choice:
    backend: str
    device: torch.device
    reason: str


def choose_for_bundle(backend: str, device: DeviceName, bundle: Bundle) -> Choice:
    """TensorRT runs the plans of a bundle, ONNX Runtime its graphs; torch.compile runs checkpoints only."""
    check_name(backend)
    if backend in ("compiled", "eager"):
        raise BackendUnavailable(
            f"backend {backend} for a bundle",
            expected="onnxruntime or tensorrt (a bundle holds ONNX graphs and TensorRT plans)",
            got=backend,
            remedy=f'Use backend="onnxruntime", or VideoEngine.from_checkpoint(CHECKPOINT) to run {backend}.',
        )
    where = resolve(device)
    if backend == "tensorrt":
        if where.type != "cuda":
            raise BackendUnavailable(
                "backend tensorrt",
                expected="a CUDA GPU",
                got="none that torch can use" if device == "auto" else f"device {where}",
                remedy='Use backend="onnxruntime" on the CPU.',
            )
        return Choice("tensorrt", where, "asked for")
    if backend == "onnxruntime" and device != "auto":
        return Choice("onnxruntime", where, "asked for")
    if where.type == "cpu":
        reason = "asked for" if device != "auto" else "a bundle of ONNX graphs; torch sees no CUDA GPU"
        return Choice("onnxruntime", where, reason)
    because = ""
    if backend == "auto":
        no_plans = without_plans(bundle, where)
        if not no_plans:
            return Choice("tensorrt", where, "a CUDA GPU, and a TensorRT plan for it of every network")
        because = f"; {no_plans}; torch.compile runs checkpoints only"
    if device == "auto" and not _has_cuda_provider():
        idle = f"the GPU stays idle: onnxruntime has no CUDA provider here ({install_line('cuda')})"
        return Choice("onnxruntime", torch.device("cpu"), idle + because)
    return Choice("onnxruntime", where, "a bundle of ONNX graphs, and a CUDA GPU" + because)


def without_plans(bundle: Bundle, device: torch.device) -> str:
    """Why TensorRT does not run every network of a bundle on a GPU, and what to do; empty when it does."""
    if not bundle.manifest.plans:
        return f"no TensorRT plans ({build_command(bundle.folder)} builds them)"
    try:
        here = machine(device)
    except BackendUnavailable as error:
        return f"not {error}"
    refused = {entry.spec.key: refusal(bundle, entry.spec, here) for entry in bundle.manifest.networks}
    reasons = [f"{key}: {reason}" for key, reason in refused.items() if reason]
    return f"no TensorRT plan of {', '.join(reasons)} ({build_command(bundle.folder)})" if reasons else ""


def choose_for_checkpoint(backend: str, device: DeviceName) -> Choice:
    """Torch runs a checkpoint: compiled on a GPU, eager on the CPU, where compiling costs minutes."""
    check_name(backend)
    if backend in ("onnxruntime", "tensorrt"):
        plans = " and `svd-export tensorrt BUNDLE`" if backend == "tensorrt" else ""
        raise BackendUnavailable(
            f"backend {backend} for a checkpoint",
            expected="a bundle",
            got="a checkpoint",
            remedy=f"Run `svd-export onnx CHECKPOINT -o BUNDLE`{plans}, "
            "then use VideoEngine.from_bundle(BUNDLE).",
        )
    where = resolve(device)
    if backend != "auto":
        return Choice(backend, where, "asked for")
    if where.type == "cuda":
        return Choice("compiled", where, "a CUDA GPU: torch.compile pays after the first video")
    return Choice("eager", where, "no GPU: torch.compile would spend minutes on the CPU first")


def check_name(backend: str) -> None:
    if backend not in get_args(BackendName):
        raise SettingsError(
            "backend",
            expected=", ".join(get_args(BackendName)),
            got=repr(backend),
            remedy="Choose one of these.",
        )


def resolve(device: DeviceName) -> torch.device:
    """The torch device of a name; "auto" is the first CUDA GPU, or else the CPU.

    Raises SettingsError for another kind of device, BackendUnavailable for a GPU that is not here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, torch.device):
        device = str(device)
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in PROVIDERS or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise SettingsError(
            "device",
            expected="auto, cpu, cuda or cuda:N, or a torch.device of these",
            got=repr(device),
            remedy="Choose one of these.",
        )
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device {device}",
            expected="a CUDA GPU of this number that torch can use",
            got=f"{torch.cuda.device_count()} GPUs with torch {torch.__version__}",
            remedy='Use device="cpu", or install the NVIDIA driver and a CUDA build of torch.',
        )
    return torch.device("cuda", number)


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # opening the backend says so, with the install line
    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()
