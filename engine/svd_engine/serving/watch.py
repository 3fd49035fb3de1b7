"""Follows one call of the engine: how far it is, and what the video will look like.

Letters in shapes: N videos, F frames, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from svd_engine.media.video import to_uint8
from svd_engine.observer import Observer, Step
from svd_engine.serving import preview

OnStepEnd = Callable[[int, np.ndarray | None], None]  # (steps done, the preview if one was due)


@dataclass(frozen=True)
class Progress:
    stage: str = ""  # the running one; the last one after the end
    step: int = 0  # denoising steps done
    steps: int = 0  # of the video; 0 until the first is done
    evaluation: int = 0  # evaluations of the denoiser done: the measure of time, one or two a step
    evaluations: int = 0  # of the video; 0 until the first is done
    network_calls: int = 0  # runs of any network
    decoded: float = 0  # frames of all videos, as the observer counts them
    frames: int = 0  # of all videos; 0 until the first is decoded


class Watch(Observer):
    """`progress` and `preview` may be read from any thread while the call runs.

    preview_every: steps from one preview to the next; 0 is none.  A preview shows the first video,
    [F,h,w,3] bytes.  `on_step_end` is called after every step, in the thread of the call.
    """

    def __init__(
        self, latent_scale: float, preview_every: int = 0, on_step_end: OnStepEnd | None = None
    ) -> None:
        self.latent_scale, self.preview_every, self.on_step_end = latent_scale, preview_every, on_step_end
        self.progress = Progress()
        self.preview: np.ndarray | None = None  # the newest
        self._colours: Tensor | None = None  # from latents

    def on_stage_begin(self, stage: str) -> None:
        self.progress = replace(self.progress, stage=stage)

    def on_network_run(self, network: str) -> None:  # noqa: ARG002
        self.progress = replace(self.progress, network_calls=self.progress.network_calls + 1)

    def on_first_latent(self, pixels: Tensor, latent: Tensor) -> None:
        if self.preview_every:
            self._colours = preview.fit(pixels, latent)

    def on_evaluation(self, done: int, evaluations: int) -> None:
        self.progress = replace(self.progress, evaluation=done, evaluations=evaluations)

    def on_decoding(self, done: float, frames: int) -> None:
        self.progress = replace(self.progress, decoded=done, frames=frames)

    def on_step(self, step: Step) -> None:
        done = step.index + 1
        shown: np.ndarray | None = None
        if self._colours is not None and done % self.preview_every == 0:
            shown = to_uint8(preview.project(step.denoised[0] / self.latent_scale, self._colours))
            self.preview = shown
        self.progress = replace(self.progress, step=done, steps=step.steps)
        if self.on_step_end is not None:
            self.on_step_end(done, shown)
