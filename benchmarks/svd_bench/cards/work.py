"""What one video costs, counted, and what others have published, as data.  Knows no GPU.

Counted at 576x1024 over diffusers' and transformers' own modules, without our rewrites, on torch's meta
device; tests/bench/test_work.py counts again.  FLOP are those of matrix products, convolutions and
attention, 2 per multiply-add.  Bytes are the memory traffic of everything else, when each operation reads
its inputs and writes its output once, unfused: 2 bytes an element, 4 in the VAE encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["denoiser", "vae_decoder", "encoders"]
PARTS: tuple[Part, ...] = ("denoiser", "vae_decoder", "encoders")


@dataclass(frozen=True)
class Work:
    flop: float
    bytes: float

    def __mul__(self, times: int) -> Work:
        return Work(self.flop * times, self.bytes * times)


DENOISER_STEP = {14: Work(89.604e12, 251.06e9), 25: Work(159.896e12, 447.93e9)}  # by frames; both CFG halves
DECODED_FRAME = Work(6.94297e12, 30.106e9)
VAE_ENCODER = Work(2.6091e12, 15.725e9)
IMAGE_ENCODER = Work(0.3346e12, 0.386e9)
FRAMES = tuple(DENOISER_STEP)


def video(frames: int, steps: int = 25) -> dict[Part, Work]:
    """One video of SVD (14 frames) or SVD-XT (25) with classifier-free guidance."""
    return {
        "denoiser": DENOISER_STEP[frames] * steps,
        "vae_decoder": DECODED_FRAME * frames,
        "encoders": Work(VAE_ENCODER.flop + IMAGE_ENCODER.flop, VAE_ENCODER.bytes + IMAGE_ENCODER.bytes),
    }


@dataclass(frozen=True)
class Published:
    """SVD-XT, 25 frames, 25 steps, classifier-free guidance; lossless stacks only."""

    stack: str
    kind: Literal["eager", "tensorrt", "fused"]  # rows of one kind share their efficiency
    card: str
    seconds: float
    source: str
    accumulation: Literal["fp16", "fp32"] = "fp32"
    stages: dict[Part, float] | None = None  # seconds, where published


TENSORRT = "Model card of stabilityai/stable-video-diffusion-img2vid-xt-1-1-tensorrt"
ONEDIFF = "OneDiff's README, SVD E2E time (imgs/0_12_svd.png), February 2024"
STABLE_FAST = "stable-fast's README, December 2023"

PUBLISHED = (
    Published("diffusers 0.26, torch 2.2", "eager", "A100 80GB SXM", 39.851, ONEDIFF),
    Published("diffusers, torch 2.1", "eager", "GeForce RTX 4080", 83, STABLE_FAST),
    Published(
        "TensorRT", "tensorrt", "A100 80GB SXM", 32.166, TENSORRT,
        stages={"denoiser": 27.48988, "vae_decoder": 4.54412, "encoders": 0.11888},
    ),
    Published("TensorRT", "tensorrt", "A100 80GB PCIe", 35.258, TENSORRT),
    Published("TensorRT", "tensorrt", "H100 PCIe", 22.645, TENSORRT),
    Published("OneDiff Community 0.12", "fused", "A100 80GB SXM", 25.2, ONEDIFF, "fp16"),
    Published(
        "OneDiff", "fused", "GeForce RTX 4090", 30.9, "second-hand; OneDiff's own page not found", "fp16"
    ),
    Published("stable-fast", "fused", "GeForce RTX 4080", 47, STABLE_FAST, "fp16"),
)  # fmt: skip
