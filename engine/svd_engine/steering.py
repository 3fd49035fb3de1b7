"""What a caller may read and change of a call while it runs, under the names that diffusers' pipelines have.

`Steering` is the state of one call: the sampler reads it before every step.  `Steered` shows it on the
engine, where diffusers' callbacks look for it, and holds the progress bar's settings.

Letters in shapes: N videos, F frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from svd_engine.errors import NotOffered, SettingsError
from svd_engine.values import finite

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
Scale = float | Tensor  # of all frames, or [N, F, 1, 1, 1]


class Steering:
    """Guidance and the wish to stop, of one call.  scales: [N, F], what a guider gives."""

    def __init__(self, steps: int, scales: Tensor) -> None:
        self.steps = steps
        self.interrupted = False  # skips the steps that are left; what there is, is decoded
        self._shape, self._device = (*scales.shape, 1, 1, 1), scales.device
        self.guide(scales[:, :, None, None, None])

    def guide(self, scale: object) -> None:
        """Takes the guidance scale of the steps to come: a number, or a tensor [N, F, 1, 1, 1].

        Raises SettingsError for anything else, and for values that are not finite.
        """
        if isinstance(scale, Tensor) and scale.dim():
            fits = scale.dim() == 5 and all(
                a in (1, b) for a, b in zip(scale.shape, self._shape, strict=True)
            )
            if not (fits and bool(scale.isfinite().all())):
                raise SettingsError(
                    "guidance_scale",
                    expected=f"a finite number, or finite numbers in the shape {list(self._shape)}",
                    got=f"{list(scale.shape)}" if not fits else "NaN or infinity",
                    remedy="Set one number for all frames, or change a copy of the tensor that is there.",
                )
            self.scale: Scale = scale
        else:
            self.scale = finite("guidance_scale", scale)
        self._seen = _version(self.scale)
        scales = torch.as_tensor(self.scale, dtype=torch.float32, device=self._device)
        self.guided = bool(scales.max() > 1)  # as diffusers' do_classifier_free_guidance
        scales = scales if self.guided else torch.ones_like(scales)
        self.scales = scales.expand(self._shape).flatten(1)  # [N, F], what the denoiser is given

    def refresh(self) -> None:
        """Takes the scale anew if its tensor was changed in place.  Does not wait for a GPU if it was not."""
        if _version(self.scale) is None or _version(self.scale) != self._seen:
            self.guide(self.scale)


def _version(scale: Scale) -> int | None:
    """How often a tensor was changed in place; None if torch does not count, as in inference mode."""
    if not isinstance(scale, Tensor):
        return 0
    return None if scale.is_inference() else scale._version


# of `Steered`, what belongs to a call
CALL_NAMES = (
    "num_timesteps", "guidance_scale", "_guidance_scale", "do_classifier_free_guidance", "interrupt",
    "_interrupt", "_call",
)  # fmt: skip


def no_call() -> NotOffered:
    return NotOffered(
        "guidance, interrupt and num_timesteps",
        expected="a call of the engine, to which they belong",
        got="none so far",
        remedy="Read and set them in callback_on_step_end, or while another thread's call runs.",
    )


class Steered:
    """The attributes of diffusers' pipelines that callbacks read and set, and its progress bar.

    Those of a call are known from the first call on, and stay as its end left them.  What a callback sets
    holds from the next step.
    """

    _steering: Steering | None = None
    _progress_bar_config: dict[str, Any] = {}  # noqa: RUF012  # replaced, never changed

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the call."""
        return self._call.steps

    @property
    def guidance_scale(self) -> Scale:
        """A tensor [N, F, 1, 1, 1] that grows from the first frame to the last, or what a callback set."""
        return self._call.scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the largest guidance scale of the next step is above 1."""
        return self._call.guided

    @property
    def _guidance_scale(self) -> Scale:
        """The name that diffusers' documentation sets in a callback; 0 or 1 ends guidance."""
        return self._call.scale

    @_guidance_scale.setter
    def _guidance_scale(self, scale: Scale) -> None:
        self._call.guide(scale)

    @property
    def interrupt(self) -> bool:
        """Set to True in a callback, or from another thread: skips the steps that are left, then decodes."""
        return self._call.interrupted

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        self._call.interrupted = bool(stop)

    _interrupt = interrupt  # the name that diffusers' documentation sets

    def set_progress_bar_config(self, **options: object) -> None:
        """Options of tqdm for the progress bar: `disable=True` hides it.  Raises SettingsError for others."""
        from tqdm import tqdm

        parameters = inspect.signature(tqdm.__init__).parameters
        known = set(parameters) - {"self", "iterable", "total", "kwargs"}
        for name in options.keys() - known:
            raise SettingsError(
                "progress bar option",
                expected=f"one of tqdm's ({', '.join(sorted(known))})",
                got=name,
                remedy="set_progress_bar_config(disable=True) hides the bar.",
            )
        self._progress_bar_config = options

    def progress_bar(self, iterable: Iterable[T] | None = None, total: int | None = None) -> tqdm[T]:
        """tqdm's bar over an iterable, or over `total` steps.  Raises SettingsError without either."""
        from tqdm.auto import tqdm

        if iterable is None and total is None:
            raise SettingsError(
                "progress_bar", expected="an iterable, or total", got="neither", remedy="Pass one of the two."
            )
        return tqdm(iterable, total=total, **self._progress_bar_config)

    @property
    def _call(self) -> Steering:
        if self._steering is None:
            raise no_call()
        return self._steering
