"""One video, watched: the part that every front shares, whatever queue stands before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from svd_engine.call_queue import Cancel
from svd_engine.engine import VideoEngine
from svd_engine.errors import Cancelled, ImageError, NonFiniteOutput, SettingsError
from svd_engine.image_conditioning import ImageConditioning
from svd_engine.output import VideoOutput
from svd_engine.serving.watch import OnStepEnd, Watch
from svd_engine.values import at_least, check_seed

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """What a client asks for.

    Raises SettingsError for a seed or a `preview_every` out of range, and for previews of an image that was
    encoded before and comes without its pixels.
    """

    image: Image | torch.Tensor | ImageConditioning  # as the engine's call takes it
    seed: int
    preview_every: int = 0  # steps; 0 is no preview
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of VideoEngine.__call__

    def __post_init__(self) -> None:
        check_seed(self.seed)
        at_least("preview_every", self.preview_every, 0)
        encoded = self.image if isinstance(self.image, ImageConditioning) else None
        if self.preview_every and encoded is not None and encoded.pixels is None:
            raise SettingsError(
                "preview_every",
                expected="0 with an ImageConditioning without pixels, which the colours are fitted to",
                got=str(self.preview_every),
                remedy="Pass ImageConditioning(embedding, first_latent, pixels).",
            )


class Status(StrEnum):
    """Where a request is: the first two pass, one of the others stays."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # its settings or its image cannot be used
    FAILED = "failed"  # a network or the machine
    EXPIRED = "expired"  # it waited for longer than it may

    @property
    def ended(self) -> bool:
        return self not in (Status.WAITING, Status.RUNNING)


def watch(engine: VideoEngine, request: VideoRequest, on_step_end: OnStepEnd | None = None) -> Watch:
    """What to give to `make_video`, and to read progress and previews from meanwhile."""
    return Watch(engine.model.latent_scale, request.preview_every, on_step_end)


def make_video(engine: VideoEngine, request: VideoRequest, watch: Watch, cancel: Cancel) -> VideoOutput:
    """Raises what the engine's call raises."""
    output: VideoOutput = engine(
        request.image,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        cancel=cancel,
        observer=watch,
        **request.arguments,
    )
    return output


def warm_up(engine: VideoEngine) -> None:
    """Loads every network and makes a video of one step.  Raises BundleError or BackendError."""
    grey = torch.full((1, 3, engine.default.height, engine.default.width), 0.5)
    engine(grey, num_inference_steps=1, output_type="pt")


def status_after(error: BaseException) -> Status:
    """How a request ended that ended with `error`."""
    if isinstance(error, Cancelled):
        return Status.CANCELLED
    return Status.REFUSED if isinstance(error, (SettingsError, ImageError)) else Status.FAILED


def must_reopen(error: BaseException) -> bool:
    """Whether networks have to be loaded anew: not after NaN, which the input or the weights give."""
    return status_after(error) is Status.FAILED and not isinstance(error, NonFiniteOutput)
