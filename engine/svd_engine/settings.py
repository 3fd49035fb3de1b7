"""What a user may ask of one generation, with ranges.  Knows no tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from svd_engine.errors import SettingsError

Fit = Literal["stretch", "crop", "pad"]
FITS: tuple[Fit, ...] = get_args(Fit)


@dataclass(frozen=True)
class Settings:
    """Every number of a call, as plain int and float.  Raises SettingsError for one that is out of range.

    Takes numbers of any kind: of Python, NumPy and torch, and whole ones written as 7.0.
    """

    frames: int
    height: int  # pixels
    width: int  # pixels
    steps: int = 25
    sigmas: tuple[float, ...] | None = None  # a caller's own noise levels replace `steps`
    min_guidance_scale: float = 1.0  # of the first frame
    max_guidance_scale: float = 3.0  # of the last frame; guidance acts if one of the two is above 1
    fps: int = 7
    motion_bucket_id: float = 127  # 0..1023; SVD was trained on 0..255, more is more motion
    noise_aug_strength: float = 0.02  # std of the noise on the first frame, pixels in [-1, 1]
    decode_chunk_size: int | None = None  # frames per decoder call; None: all at once
    videos_per_image: int = 1
    fit: Fit = "stretch"  # what becomes of an image of another aspect; diffusers stretches

    def __post_init__(self) -> None:
        values = {
            "frames": at_least("num_frames", self.frames, 1),
            "height": at_least("height", self.height, 1),
            "width": at_least("width", self.width, 1),
            "steps": at_least("num_inference_steps", self.steps, 1),
            "sigmas": None if self.sigmas is None else _noise_levels(self.sigmas),
            "min_guidance_scale": finite("min_guidance_scale", self.min_guidance_scale),
            "max_guidance_scale": finite("max_guidance_scale", self.max_guidance_scale),
            "fps": at_least("fps", self.fps, 1),
            "motion_bucket_id": finite("motion_bucket_id", self.motion_bucket_id, 0, 1023),
            "noise_aug_strength": finite("noise_aug_strength", self.noise_aug_strength, 0),
            "videos_per_image": at_least("num_videos_per_prompt", self.videos_per_image, 1),
        }
        if self.decode_chunk_size is not None:
            values["decode_chunk_size"] = at_least("decode_chunk_size", self.decode_chunk_size, 1)
        check_fit(self.fit)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance acts: the larger of the two scales is above 1.

        diffusers' `do_classifier_free_guidance` looks at `max_guidance_scale` while it encodes and at the
        largest scale of all frames in the loop, and stops with a RuntimeError where the two disagree, as at
        min 3, max 1.  Where diffusers gives a video, this is its answer.
        """
        return max(self.min_guidance_scale, self.max_guidance_scale) > 1

    def check_size(self, multiple: int) -> None:
        """Raises SettingsError unless the networks can take the size."""
        for name, value in (("height", self.height), ("width", self.width)):
            if value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise SettingsError(
                    name,
                    expected=f"a multiple of {multiple} pixels",
                    got=str(value),
                    remedy=f"The nearest that works is {nearest}.",
                )


def check_fit(fit: object) -> None:
    """Raises SettingsError unless it is one of FITS."""
    if fit not in FITS:
        raise SettingsError("fit", expected=", ".join(FITS), got=repr(fit), remedy="Choose one of these.")


def check_seed(seed: int) -> None:
    """torch's generators take 64 bits, and wrap negative seeds around.  Raises SettingsError."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise _refusal("seed", "a whole number from 0 to 2^64 - 1", seed)


def at_least(name: str, value: object, low: int) -> int:
    """A whole number of any kind as an int.  Raises SettingsError below `low`, or for anything else."""
    number = _plain(value)
    if number is None or not _is_finite(number) or number != int(number) or number < low:
        raise _refusal(name, f"a whole number of at least {low}", value)
    return int(number)


def finite(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """A real number of any kind as a float.  Raises SettingsError outside `low` to `high`, NaN included."""
    number = _plain(value)
    if number is None or not _is_finite(number):
        raise _refusal(name, "a finite number", value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise _refusal(name, f"{low} or more" if high is None else f"{low} to {high}", value)
    return float(number)


def _is_finite(number: float) -> bool:
    """Whether it is, and within float64: networks are told every number in floating point."""
    return abs(number) <= sys.float_info.max  # False for NaN; an int of any length can be compared


def _plain(value: object) -> int | float | None:
    """The Python number in a number of Python or NumPy or a tensor of one element; None for all else."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # several elements: NumPy and torch raise differently
            return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _noise_levels(sigmas: object) -> tuple[float, ...]:
    """The caller's own; what they must be beside numbers, `sampling.given_sigmas` checks."""
    levels = sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas
    numbers = None if isinstance(levels, str) or not isinstance(levels, Iterable) else list(levels)
    plain = [] if numbers is None else [_plain(number) for number in numbers]
    if numbers is None or None in plain:
        raise SettingsError(
            "sigmas",
            expected="a list of numbers",
            got=repr(sigmas),
            remedy="For n steps pass n + 1 noise levels that fall, the last usually 0.0.",
        )
    return tuple(float(number) for number in plain if number is not None)


def _refusal(name: str, expected: str, got: object) -> SettingsError:
    return SettingsError(name, expected=expected, got=repr(got), remedy="Pass a value in this range.")
