"""What one run was: settings, seed, what ran where, milliseconds, peak memory, versions.  Plain data."""

from __future__ import annotations

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from svd_engine._version import __version__
from svd_engine.request import Settings
from svd_engine.spec.reuse import Reuse
from svd_engine.spec.weights import LoraFile, WeightFile

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
    "av",
)


class StagePlacement(BaseModel):
    """Where a stage really ran; see `backends.network.Placement`."""

    backend: str
    device: str
    dtype: str
    detail: str = ""


class Seam(BaseModel):
    """Where a continued clip ends and new frames begin, beside the medians between the clip's own frames.

    psnr: of neighbouring frames, decibels, infinite for equal ones.  flow: mean length of the optical flow,
    pixels a frame; None where OpenCV is not installed.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    psnr: float
    median_psnr: float
    flow: float | None = None
    median_flow: float | None = None


class PlannedStage(BaseModel):
    """Memory of one network under a plan, in bytes, known before it runs."""

    network: str  # key
    held_bytes: int  # weights of all networks on the device while it runs
    peak_bytes: int  # of the whole process on the device
    parked_bytes: int  # activations that wait in host memory
    moved_bytes: int  # weights and activations: over a GPU's bus, or from the disk
    streamed_bytes: int = 0  # of these, weights in each call of the network
    source: Literal["counted", "compiled"]


class PlanReport(BaseModel):
    """How a call kept to its memory budget."""

    residency: str
    guidance: str
    batch: int
    decoding: str
    budget_bytes: int
    peak_bytes: int
    streamed_bytes: int = 0  # weights over the bus in each call of the network of which most stream
    stages: list[PlannedStage]
    other_half: PlanReport | None = None  # of guidance, on the second of two devices


class PromptReport(BaseModel):
    """Of which words, and how, a text-to-image model made the photograph."""

    prompt: str
    model: str  # folder or hub id
    revision: str | None  # commit of a hub id; None of a folder
    pipeline: str  # class of diffusers
    scheduler: str
    steps: int | None  # the pipeline's own; None where its call names none
    guidance_scale: float | None
    width: int  # pixels
    height: int
    seed: int
    device: str
    dtype: str
    milliseconds: float  # with loading


class RunReport(BaseModel):
    """What one call ran: settings, backend and device of each stage, times in ms, memory, versions."""

    model_config = ConfigDict(protected_namespaces=())

    model: str
    random_weights: bool
    source: str  # bundle or checkpoint, as the user named it
    weights: list[WeightFile] = []  # of the checkpoint, as read now or when the bundle was exported
    lora: list[LoraFile] = []  # fused into the UNet
    profile: str
    settings: Settings
    prompt: PromptReport | None = None  # of a photograph that was made of words
    seeds: list[int]  # of the generators; empty when the caller gave none
    chosen_because: str
    stages: dict[str, StagePlacement]  # by network; a decoder of a second chunk size by its key
    rewrites: dict[str, int]  # places by "component/rewrite"
    without_rewrites: list[str]
    swap_networks: bool  # one network in memory at a time
    plan: PlanReport | None = None  # None without a memory budget, and where "auto" found ample memory
    stage_ms: dict[str, float]
    step_ms: list[float]  # of the denoiser in each step
    evaluation_ms: list[float] = []  # of each evaluation of the denoiser: one or two a step
    reuse: Reuse | None = None  # between evaluations
    shallow_evaluations: list[int] = []  # that ran the shallow denoiser only, from 0
    exchanged_bytes: int = 0  # between two devices that had half of guidance each
    seams: list[Seam] = []  # of a clip that was continued, one for each video
    waited_ms: float  # for earlier calls of the same engine
    total_ms: float  # from the end of that wait
    peak_host_bytes: int  # resident memory of the process so far, at its highest
    peak_device_bytes: int | None  # as torch's allocator counts it; None without a GPU
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions of everything that shapes a result; what is not installed is left out."""
    found = {"svd-engine": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def size(count: int) -> str:
    """Bytes in words: in GiB from a tenth of one on, below in MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"


def peak_host_bytes() -> int:
    """Resident memory of this process at its highest."""
    import psutil

    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux's getrusage counts the process that this one was forked from
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(peak)


def peak_device_bytes(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated(device))
