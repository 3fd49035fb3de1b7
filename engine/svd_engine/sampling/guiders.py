"""Guiders: the scale of classifier-free guidance by video and frame, float32 [N, F]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Guider = Callable[[float, float, int, int], Tensor]  # (first, last, videos, frames) -> [N, F]


def linear(first: float, last: float, videos: int, frames: int) -> Tensor:
    """From the first frame's scale to the last one's in equal steps, the same for every video.

    As diffusers' `StableVideoDiffusionPipeline.__call__` makes its guidance_scale.
    """
    return torch.linspace(first, last, frames, dtype=torch.float32).repeat(videos, 1)
