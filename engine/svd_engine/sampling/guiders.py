"""Guiders: the scale of classifier-free guidance by video and frame, float32 [N, F].

low and high are the call's `min_guidance_scale` and `max_guidance_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Guider = Callable[[float, float, int, int], "Tensor"]  # (low, high, videos, frames) -> [N, F]
EDGE = 0.1  # share of the frames on which a trapezoid rises, and falls


def linear(low: float, high: float, videos: int, frames: int) -> Tensor:
    """From the first frame's scale to the last one's in equal steps, the same for every video.

    As diffusers' `StableVideoDiffusionPipeline.__call__` makes its guidance_scale.
    """
    import torch

    return torch.linspace(low, high, frames, dtype=torch.float32).repeat(videos, 1)


def constant(_low: float, high: float, videos: int, frames: int) -> Tensor:
    """`high` in every frame (sgm's VanillaCFG)."""
    return given([high] * frames, videos)


def triangle(low: float, high: float, videos: int, frames: int) -> Tensor:
    """Up from `low` to `high` in the middle frame, and down again (sgm's TrianglePredictionGuider).

    An even number of frames has no middle one, and stays below `high`.
    """
    import torch

    place = torch.linspace(0, 1, frames, dtype=torch.float32)
    return (low + (high - low) * (1 - (2 * place - 1).abs())).repeat(videos, 1)


def trapezoid(low: float, high: float, videos: int, frames: int) -> Tensor:
    """Up from `low` to `high` on the first tenth of the frames, down on the last, `high` between.

    sgm's TrapezoidPredictionGuider, whose plateau is 1.  Below ten frames there is but the plateau.
    """
    import torch

    rise = torch.linspace(low, high, int(frames * EDGE), dtype=torch.float32)
    plateau = torch.full((frames - 2 * len(rise),), high, dtype=torch.float32)
    return torch.cat([rise, plateau, rise.flip(0)]).repeat(videos, 1)


def given(scales: Sequence[float], videos: int) -> Tensor:
    """A caller's own factors, one a frame."""
    import torch

    return torch.tensor([tuple(scales)] * videos, dtype=torch.float32)
