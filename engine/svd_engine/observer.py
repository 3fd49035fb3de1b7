"""What the engine tells a watcher of a call while it runs.

Letters in shapes: N videos, F frames, H W pixels, h w latent pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A denoising step that has ended."""

    index: int  # from 0
    steps: int  # of the call
    denoised: Tensor  # [N,F,4,h,w], the video's latents as the network estimates them, scaled


class Observer:
    """Hears nothing.  Derive from it and override what you want to hear.

    Methods are called in the thread of the call, between two runs of networks or two slices of a streamed
    decoder, and the call waits for them; what they raise ends it.  Tensors may be overwritten by the next run
    of a network: copy what you keep.
    Work on a GPU may still be queued when a method is called.
    """

    def on_stage_begin(self, stage: str) -> None:
        """Names are those of the report's `stage_ms`: preprocess, load, image_encoder, ..."""

    def on_stage_end(self, stage: str) -> None:
        """Not called for a stage that fails."""

    def on_network_run(self, network: str) -> None:
        """A network has run once; of a denoiser that reuses, "denoiser" or "shallow_denoiser"."""

    def on_first_latent(self, pixels: Tensor, latent: Tensor) -> None:
        """What the VAE encoder took, [images,3,H,W] in [-1, 1], and gave, [images,4,h,w], unscaled.

        Not called for an `ImageConditioning` without pixels.
        """

    def on_evaluation(self, done: int, evaluations: int) -> None:
        """The denoiser has given `done` of the call's estimates; a step takes one or two.

        One is a run of the network, or several: for each batch of videos, and for each half of guidance
        where the profile's guidance is "single".
        """

    def on_step(self, step: Step) -> None:
        """Called before the caller's `callback_on_step_end`."""

    def on_decoding(self, done: float, frames: int) -> None:
        """The decoder has given `done` of the frames of all videos.

        Called after each chunk, and after each slice of a streamed decoder: that gives all frames at its end,
        and counts as having given the share of them that it has done of its work.
        """


UNOBSERVED = Observer()
