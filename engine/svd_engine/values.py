"""Checks of single values: numbers of any kind become Python's, what is out of range a SettingsError.

Which parameter has which range, `request` says.  Knows no tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from os import PathLike, fspath
from pathlib import Path
from typing import Literal, get_args

from svd_engine.errors import SettingsError

Fit = Literal["stretch", "crop", "pad"]
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FITS: tuple[Fit, ...] = get_args(Fit)


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    """Raises SettingsError unless `value` is allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise SettingsError(name, expected=", ".join(allowed), got=repr(value), remedy="Choose one of these.")
    return value


def as_path(name: str, value: object) -> Path:
    """A path as users give it.  Raises SettingsError for what is neither a string nor a path."""
    if isinstance(value, str) or (isinstance(value, PathLike) and isinstance(fspath(value), str)):
        return Path(value)
    raise SettingsError(
        name,
        expected="a path, as a string or pathlib.Path",
        got=f"an object of type {type(value).__name__}",
        remedy="Pass the path of a file or folder.",
    )


def check_seed(seed: object) -> int:
    """torch's generators take 64 bits, and wrap negative seeds around.  Raises SettingsError."""
    number = _plain(seed)
    if not isinstance(number, int) or not 0 <= number < 2**64:  # a float does not hold 64 bits
        raise _refusal("seed", "a whole number from 0 to 2^64 - 1", seed)
    return number


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
        held = isinstance(number, int) or (number is not None and isfinite(number))
        raise _refusal(name, "a number that float32 holds" if held else "a finite number", value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise _refusal(name, f"{low} or more" if high is None else f"{low} to {high}", value)
    return float(number)


def _is_finite(number: float) -> bool:
    """Whether it is, and within float32: networks are told every number in it."""
    return abs(number) <= FLOAT32_MAX  # False for NaN; an int of any length can be compared


def _plain(value: object) -> int | float | None:
    """The Python number in a number of Python or NumPy or a tensor of one element; None for all else."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):  # several elements: NumPy and torch raise differently
            return None
    if isinstance(value, (Fraction, Decimal)):
        return int(value) if value == value // 1 else float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def angles(name: str, value: object, low: float | None, high: float | None) -> float | tuple[float, ...]:
    """Degrees, one number or a list of one for each frame.

    Raises SettingsError unless they are finite, from `low` to `high`.
    """
    numbers = _listed(value) if _plain(value) is None else None
    if numbers is None:
        return finite(name, value, low, high)
    if not numbers:
        raise _refusal(name, "a number of degrees, or a list of one for each frame", value)
    return tuple(finite(name, number, low, high) for number in numbers)


def guidance_scales(scales: object) -> tuple[float, ...]:
    """A caller's own factors of guidance, one a frame.  Raises SettingsError unless finite numbers."""
    numbers = _listed(scales)
    if not numbers:
        raise SettingsError(
            "guidance_scales",
            expected="a list of numbers, one for each frame",
            got=repr(scales),
            remedy="Pass as many factors as the video has frames.",
        )
    return tuple(finite("guidance_scales", number) for number in numbers)


def noise_levels(sigmas: object) -> tuple[float, ...]:
    """A caller's own noise levels, two or more.

    Raises SettingsError unless they are finite and fall strictly, as float32, to 0 or above.
    """
    numbers = _listed(sigmas)
    plain = [_plain(number) for number in numbers or ()]
    if numbers is None or None in plain:
        raise _no_noise_levels("a list of numbers", sigmas)
    levels = [float(number) for number in plain if number is not None and _is_finite(number)]
    single = array("f", levels)  # the precision that the sampler takes them in
    finite_all = len(levels) == len(plain) and all(map(isfinite, single))
    if not finite_all or len(single) < 2 or single[-1] < 0 or any(a <= b for a, b in pairwise(single)):
        raise _no_noise_levels(
            "two or more finite noise levels that fall strictly and end at 0 or above", numbers
        )
    return tuple(levels)


def _listed(values: object) -> list[object] | None:
    """The elements of a sequence, array or tensor; None for all else."""
    elements = values.tolist() if hasattr(values, "tolist") else values
    return None if isinstance(elements, str) or not isinstance(elements, Iterable) else list(elements)


def _no_noise_levels(expected: str, got: object) -> SettingsError:
    return SettingsError(
        "sigmas",
        expected=expected,
        got=repr(got),
        remedy="For n steps pass n + 1 levels that fall, the last usually 0.0.",
    )


def _refusal(name: str, expected: str, got: object) -> SettingsError:
    return SettingsError(name, expected=expected, got=repr(got), remedy="Pass a value in this range.")
