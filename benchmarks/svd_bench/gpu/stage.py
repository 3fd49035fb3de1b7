"""What a stage of the GPU check is, and the small video that runtimes are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svd_bench.gpu.context import Context
from svd_bench.subjects.opening import FPS, SEED
from svd_engine.spec.profile import Profile

if TYPE_CHECKING:
    from svd_engine.engine import VideoEngine

SMALL = Profile(frames=3, height=64, width=64, decode_chunk=3)
VIDEO_TOLERANCE = 0.05  # of half precision after two steps, against float32


@dataclass
class Findings:
    """What a stage found besides its rows."""

    facts: dict[str, str] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class GpuStage:
    """`needs_s` is about what it takes on an H200 (compiling included): less time left, and it is skipped."""

    name: str
    needs_s: float
    run: Callable[[Context], Findings]


def small_video(engine: VideoEngine) -> Tensor:
    """Frames of `SMALL`, two steps from a seed, on the CPU; closes the engine."""
    engine.set_progress_bar_config(disable=True)
    with engine:
        frames = engine(
            image=torch.rand(1, 3, SMALL.height, SMALL.width, generator=torch.Generator().manual_seed(SEED)),
            height=SMALL.height,
            width=SMALL.width,
            num_frames=SMALL.frames,
            num_inference_steps=2,
            fps=FPS,
            output_type="pt",
            generator=torch.Generator().manual_seed(SEED),
        ).frames
        assert isinstance(frames, Tensor)  # output_type "pt"
        return frames.cpu()
