"""Which backend and device a request means here.  Only `auto` chooses, and it says why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from svd_engine.backends.onnxruntime import PROVIDERS
from svd_engine.backends.registry import BACKENDS, PLAN_BACKENDS, check_name, names
from svd_engine.backends.tensorrt.library import host
from svd_engine.bundle.flavours import Flavour
from svd_engine.bundle.plans import build_command, refusal
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.install import install_line

DeviceName = str | torch.device  # "auto", "cpu", "cuda", "cuda:1"
MOST_GPUS = 128  # torch keeps the number of one in seven bits


@dataclass(frozen=True)
class Choice:
    backend: str
    device: torch.device
    reason: str


def choose_for_bundle(backend: str, device: DeviceName, bundle: Bundle) -> Choice:
    """TensorRT runs the plans of a bundle, ONNX Runtime its graphs; torch.compile runs checkpoints only."""
    check_name(backend)
    row = BACKENDS.get(backend)  # None: auto
    if row is not None and not row.of_bundle:
        raise BackendUnavailable(
            f"backend {backend} for a bundle",
            expected=f"one of {names(of_bundle=True)} (a bundle holds ONNX graphs and TensorRT plans)",
            got=backend,
            remedy=f'Use backend="onnxruntime", or VideoEngine.from_checkpoint(CHECKPOINT) to run {backend}.',
        )
    where = resolve(device)
    if row is not None and where.type not in row.devices:
        raise BackendUnavailable(
            f"backend {backend}",
            expected="a CUDA GPU",
            got="none that torch can use" if device == "auto" else f"device {where}",
            remedy='Use backend="onnxruntime" on the CPU.',
        )
    if row is not None and (row.flavour is not None or device != "auto"):
        return Choice(backend, where, "asked for")
    if where.type == "cpu":
        reason = "asked for" if device != "auto" else "a bundle of ONNX graphs; torch sees no CUDA GPU"
        return Choice("onnxruntime", where, reason)
    because = ""
    if row is None:
        fitting, no_plans = _fitting_flavour(bundle, where)
        if fitting is not None:
            title = fitting.title
            return Choice(fitting.name, where, f"a CUDA GPU, and a {title} plan for it of every network")
        because = f"; {no_plans}; torch.compile runs checkpoints only"
    if device == "auto" and not _has_cuda_provider():
        idle = f"the GPU stays idle: onnxruntime has no CUDA provider here ({install_line('cuda')})"
        return Choice("onnxruntime", torch.device("cpu"), idle + because)
    return Choice("onnxruntime", where, "a bundle of ONNX graphs, and a CUDA GPU" + because)


def _fitting_flavour(bundle: Bundle, device: torch.device) -> tuple[Flavour | None, str]:
    """The first flavour whose plans run every network of a bundle on a GPU; else none, and why."""
    if not bundle.manifest.plans:
        return None, f"no TensorRT plans (run: {bundle.plans_command()})"
    reasons = []
    for row in PLAN_BACKENDS:
        assert row.flavour is not None
        if not any(plan.flavour == row.name for plan in bundle.manifest.plans):
            continue
        reason = without_plans(bundle, device, row.flavour)
        if not reason:
            return row.flavour, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


def without_plans(bundle: Bundle, device: torch.device, flavour: Flavour) -> str:
    """Why a flavour of TensorRT does not run every network of a bundle on a GPU, and what to do; empty when
    it does."""
    try:
        here = host(flavour, device)
    except BackendUnavailable as error:
        return f"not {error}"
    build = f"run: {build_command(bundle, here)}"
    if not any(plan.flavour == flavour.name for plan in bundle.manifest.plans):
        return f"no {flavour.title} plans ({build})"
    refused = {entry.spec.key: refusal(bundle, entry.spec, here) for entry in bundle.manifest.networks}
    reasons = [f"{key}: {reason}" for key, reason in refused.items() if reason]
    return f"no {flavour.title} plan of {', '.join(reasons)} ({build})" if reasons else ""


def choose_for_checkpoint(backend: str, device: DeviceName) -> Choice:
    """Torch runs a checkpoint: compiled on a GPU, eager on the CPU, where compiling costs minutes."""
    check_name(backend)
    row = BACKENDS.get(backend)
    if row is not None and row.of_bundle:
        flavour = f" --flavour {backend}" if backend == "tensorrt-rtx" else ""
        plans = f" and `svd-export tensorrt BUNDLE{flavour}`" if row.runs == "plans" else ""
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


def named(device: DeviceName) -> torch.device:
    """The torch device of a name, which need not be here; "auto" is the first CUDA GPU, or else the CPU.

    Raises SettingsError for another kind of device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(device, torch.device):
        device = str(device)
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    numbered = kind == "cuda" and index.isdecimal() and int(index) < MOST_GPUS
    if kind not in PROVIDERS or (index and not numbered):
        raise SettingsError(
            "device",
            expected="auto, cpu, cuda or cuda:N, or a torch.device of these",
            got=repr(device),
            remedy="Choose one of these.",
        )
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device("cpu")


def resolve(device: DeviceName) -> torch.device:
    """As `named`, of a device that is here.

    Raises SettingsError for another kind of device, BackendUnavailable for a GPU that is not here.
    """
    where = named(device)
    if where.type == "cuda" and where.index >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"device {device}",
            expected="a CUDA GPU of this number that torch can use",
            got=f"{torch.cuda.device_count()} GPUs with torch {torch.__version__}",
            remedy='Use device="cpu", or install the NVIDIA driver and a CUDA build of torch.',
        )
    return where


def _has_cuda_provider() -> bool:
    try:
        import onnxruntime
    except ImportError:
        return False  # opening the backend says so, with the install line
    return PROVIDERS["cuda"] in onnxruntime.get_available_providers()
