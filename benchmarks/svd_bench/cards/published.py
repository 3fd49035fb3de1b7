"""What others have published of SVD-XT, as data.  Knows no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Part = Literal["denoiser", "vae_decoder", "encoders"]  # in which a video's time is published and predicted
PARTS: tuple[Part, ...] = ("denoiser", "vae_decoder", "encoders")


@dataclass(frozen=True)
class Published:
    """SVD-XT, 25 frames, 25 steps, classifier-free guidance; lossless stacks only."""

    stack: str
    card: str
    seconds: float
    source: str
    accumulation: Literal["fp16", "fp32"] = "fp32"
    parts: dict[Part, float] | None = None  # seconds, where published


TENSORRT = "Model card of stabilityai/stable-video-diffusion-img2vid-xt-1-1-tensorrt"
ONEDIFF = "OneDiff's README, SVD E2E time (imgs/0_12_svd.png), February 2024"
STABLE_FAST = "stable-fast's README, December 2023"

PUBLISHED = (
    Published("diffusers 0.26, torch 2.2", "A100 80GB SXM", 39.851, ONEDIFF),
    Published("diffusers, torch 2.1", "GeForce RTX 4080", 83, STABLE_FAST),
    Published(
        "TensorRT", "A100 80GB SXM", 32.166, TENSORRT,
        parts={"denoiser": 27.48988, "vae_decoder": 4.54412, "encoders": 0.11888},
    ),
    Published("TensorRT", "A100 80GB PCIe", 35.258, TENSORRT),
    Published("TensorRT", "H100 PCIe", 22.645, TENSORRT),
    Published("OneDiff Community 0.12", "A100 80GB SXM", 25.2, ONEDIFF, "fp16"),
    Published("OneDiff", "GeForce RTX 4090", 30.9, "second-hand; OneDiff's own page not found", "fp16"),
    Published("stable-fast", "GeForce RTX 4080", 47, STABLE_FAST, "fp16"),
)  # fmt: skip
