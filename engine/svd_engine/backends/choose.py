"""Which backend and device a request means here.  Only `auto` chooses, and it says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from svd_engine.backends.ort import INSTALL, PROVIDERS
from svd_engine.errors import BackendUnavailable, SettingsError

BackendName = Literal["auto", "onnxruntime", "compiled", "eager"]
DeviceName = str  # "auto", "cpu", "cuda", "cuda:1"


@dataclass(frozen=True)
class Choice:
    backend: str
    device: torch.device
    reason: str


def choose_for_bundle(backend: str, device: DeviceName) -> Choice:
    """A bundle holds ONNX graphs, so ONNX Runtime runs it."""
    check_name(backend)
    if backend not in ("auto", "onnxruntime"):
        raise BackendUnavailable(
            f"backend {backend} for a bundle",
            expected="onnxruntime (a bundle holds ONNX graphs)",
            got=backend,
            remedy=f"Use --backend onnxruntime, or --checkpoint CHECKPOINT to run {backend}.",
        )
    if device != "auto":
        return Choice("onnxruntime", resolve(device), "asked for")
    if not torch.cuda.is_available():
        return Choice("onnxruntime", torch.device("cpu"), "a bundle of ONNX graphs; torch sees no CUDA GPU")
    if not _has_cuda_provider():
        reason = f"the GPU stays idle: onnxruntime has no CUDA provider here ({INSTALL['cuda']})"
        return Choice("onnxruntime", torch.device("cpu"), reason)
    return Choice("onnxruntime", torch.device("cuda", 0), "a bundle of ONNX graphs, and a CUDA GPU")


def choose_for_checkpoint(backend: str, device: DeviceName) -> Choice:
    """Torch runs a checkpoint: compiled on a GPU, eager on the CPU, where compiling costs minutes."""
    check_name(backend)
    if backend == "onnxruntime":
        raise BackendUnavailable(
            "backend onnxruntime for a checkpoint",
            expected="a bundle",
            got="a checkpoint",
            remedy="Run `svd-export onnx CHECKPOINT -o BUNDLE`, then pass --bundle BUNDLE.",
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
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise SettingsError(
            "device", expected="auto, cpu, cuda or cuda:N", got=repr(device), remedy="Choose one of these."
        )
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device {device}",
            expected="a CUDA GPU of this number that torch can use",
            got=f"{torch.cuda.device_count()} GPUs with torch {torch.__version__}",
            remedy="Use --device cpu, or install the NVIDIA driver and a CUDA build of torch.",
        )
    return torch.device("cuda", number)


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # opening the backend says so, with the install line
    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()
