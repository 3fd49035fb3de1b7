"""What reuse between evaluations costs in likeness and saves in time, against the whole denoiser.

Times are paired: in every round the whole denoiser runs once, then every setting, and each ratio is of one
round; the first warms up.  They are of the denoiser alone, as the engine's own clock has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from svd_bench.documents.results import Environment, Ratio
from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import Reused, ReuseDocument
from svd_bench.quality.evaluate import DEFAULTS
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, flow_difference, ssim, warp_error
from svd_bench.quality.samplers import Shape
from svd_bench.subjects.cases import checkpoint_of
from svd_bench.subjects.flop import network_flop
from svd_engine import Reuse, VideoEngine
from svd_engine.checkpoint.configs import unet_levels
from svd_engine.checkpoint.opening import Checkpoint, random_checkpoint
from svd_engine.media.motion import psnr
from svd_engine.output import VideoOutput
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import feature_of, reusing_specs
from svd_engine.spec.tables import denoiser

SETTINGS: tuple[Reuse, ...] = (Reuse(2), Reuse(3), Reuse(5), Reuse(3, branch=1), Reuse(5, threshold=0.3))
STEPS = 25
ROUNDS = 2  # timed


@dataclass(frozen=True)
class Subject:
    """An engine and the call that all have."""

    engine: VideoEngine
    call: dict[str, Any]

    def run(self, decoded: bool) -> VideoOutput:
        generator = torch.Generator().manual_seed(0)
        kind = "np" if decoded else "latent"
        return self.engine(generator=generator, output_type=kind, **self.call)


def shallow_share(checkpoint: Checkpoint, shape: tuple[int, int, int], branch: int) -> float:
    """Operations of a shallow guided step over those of a whole one, as diffusers publishes the UNet."""
    plain = denoiser(Profile(*shape), checkpoint.model.architecture, FLOAT32)
    feature = feature_of(*unet_levels(checkpoint.configs), branch)
    _, shallow = reusing_specs(plain, feature)
    return network_flop(shallow, checkpoint.configs) / network_flop(plain, checkpoint.configs)


def measure_reuse(
    source: str, shape: Shape, where: Environment, progress: Progress, variant: str | None = None
) -> ReuseDocument:
    """Every setting, on the first held-out photograph."""
    checkpoint = checkpoint_of(source, variant)
    frames, height, width = shape.of(checkpoint.model)
    name, photograph = next(iter(held_out(height, width).items()))
    call = {
        "image": photograph, "num_frames": frames, "height": height, "width": width, **DEFAULTS,
        "num_inference_steps": STEPS,
    }  # fmt: skip
    subjects = [Subject(opened(checkpoint, reuse), call) for reuse in (None, *SETTINGS)]
    rounds: list[list[float]] = []
    shown: list[VideoOutput] = []
    for number in range(1 + ROUNDS):
        made = [subject.run(decoded=number == 0) for subject in subjects]
        if number == 0:
            shown = made
        else:
            rounds.append([sum(output.report.evaluation_ms) for output in made])
        progress(f"round {number} of {ROUNDS}")
    for subject in subjects:
        subject.engine.close()
    full_size = random_checkpoint("svd-xt")
    shares = {
        reuse.branch or 0: (
            shallow_share(checkpoint, (frames, height, width), reuse.branch or 0),
            shallow_share(full_size, (25, 576, 1024), reuse.branch or 0),
        )
        for reuse in SETTINGS
    }
    whole = pictures(shown[0])
    rows = [
        reused(reuse, whole, output, [times[index] / times[0] for times in rounds], shares[reuse.branch or 0])
        for index, (reuse, output) in enumerate(zip(SETTINGS, shown[1:], strict=True), start=1)
    ]
    return ReuseDocument(
        environment=where, checkpoint=source, photograph=name, frames=frames, height=height, width=width,
        steps=STEPS, warping=warp_error(whole), rows=rows,
    )  # fmt: skip


def opened(checkpoint: Checkpoint, reuse: Reuse | None) -> VideoEngine:
    engine = VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32", reuse=reuse)
    engine.set_progress_bar_config(disable=True)
    return engine


def reused(
    reuse: Reuse, whole: Frames, output: VideoOutput, ratios: Sequence[float], shares: tuple[float, float]
) -> Reused:
    frames = pictures(output)
    report = output.report
    return Reused(
        interval=reuse.interval,
        branch=reuse.branch or 0,
        threshold=reuse.threshold,
        evaluations=len(report.evaluation_ms),
        shallow=len(report.shallow_evaluations),
        psnr=psnr(whole, frames),
        ssim=ssim(whole, frames),
        flow=flow_difference(whole, frames),
        warping=warp_error(frames),
        time=Ratio(median=float(np.median(ratios)), low=min(ratios), high=max(ratios), rounds=len(ratios)),
        shallow_share=shares[0],
        shallow_share_svd=shares[1],
    )


def pictures(output: VideoOutput) -> Frames:
    frames = output.frames[0]
    assert isinstance(frames, np.ndarray)  # output_type "np"
    return frames
