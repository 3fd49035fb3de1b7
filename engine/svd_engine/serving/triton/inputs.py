"""The inputs of one request: the parameters of a call, Triton's types, and what they become.

Knows numpy arrays, not Triton's classes.  What is absent keeps the default of `VideoEngine.__call__`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from svd_engine.errors import SettingsError
from svd_engine.request import (
    IMAGE,
    PARAMETERS,
    SEED,
    Angles,
    FrameScales,
    Latents,
    NoiseLevels,
    OneOf,
    Parameter,
    Photograph,
    Real,
    Seed,
    Settings,
    Whole,
)
from svd_engine.sampling.registry import SAMPLERS
from svd_engine.values import at_least


@dataclass(frozen=True)
class Tensor:
    """An input or output as config.pbtxt states it; -1 is any length."""

    name: str
    datatype: str  # Triton's
    dims: tuple[int, ...] = (1,)
    optional: bool = False  # inputs only


def _item(array: np.ndarray) -> Any:
    return array.item()


def _text(array: np.ndarray) -> str:
    return str(array.item().decode(errors="replace"))


def _angles(array: np.ndarray) -> Any:
    """One for all frames is a number."""
    return array.item() if array.size == 1 else array.tolist()


# Triton's type and dims of a type of parameter, and what makes an argument of `VideoEngine.__call__` from it.
FORMS: dict[type, tuple[str, tuple[int, ...], Callable[[np.ndarray], Any]]] = {
    Photograph: ("TYPE_STRING", (1,), _item),
    Seed: ("TYPE_UINT64", (1,), _item),
    Whole: ("TYPE_INT32", (1,), _item),
    Real: ("TYPE_FP32", (1,), _item),
    OneOf: ("TYPE_STRING", (1,), _text),
    NoiseLevels: ("TYPE_FP32", (-1,), np.ndarray.tolist),
    FrameScales: ("TYPE_FP32", (-1,), np.ndarray.tolist),
    Angles: ("TYPE_FP32", (-1,), _angles),
    Latents: ("TYPE_FP32", (-1, -1, -1, -1, -1), np.asarray),
}


def _tensor(parameter: Parameter) -> Tensor:
    datatype, dims, _ = FORMS[type(parameter.kind)]
    return Tensor(parameter.name, datatype, dims, optional=parameter is not IMAGE)


CALL = tuple(map(_tensor, PARAMETERS))
OUTPUT_TYPE = Tensor("output_type", "TYPE_STRING", optional=True)
PREVIEW_EVERY = Tensor("preview_every", "TYPE_INT32", optional=True)
TRITON_OUTPUT_TYPES = ("mp4", "frames")
MAX_FPS = 240  # an mp4 cannot count in any unit of time


@dataclass(frozen=True)
class Request:
    """One request, its types checked.  Ranges are the engine's to check."""

    image: bytes  # an encoded picture
    seed: int
    output_type: str
    preview_every: int  # steps; 0 is no preview
    sampling: dict[str, Any]  # arguments of VideoEngine.__call__

    @property
    def fps(self) -> int:
        return int(self.sampling.get("fps", Settings.fps))


def read(given: Mapping[str, np.ndarray], max_steps: int, max_videos: int, own_steps: int) -> Request:
    """`given` holds the tensors that the client sent, `own_steps` are the model's, taken where it sends none.

    The two limits keep one request from holding an instance for hours; everything else that costs time or
    memory is bounded by the bundle's static profiles.  Raises SettingsError.
    """
    if IMAGE.name not in given:
        raise SettingsError(
            "image",
            expected="an encoded picture in the input of this name",
            got=f"the inputs {', '.join(given)}",
            remedy="Send a JPEG, PNG or WebP file's content.",
        )
    call = {p.name: FORMS[type(p.kind)][2](given[p.name]) for p in PARAMETERS if p.name in given}
    _at_most("sigmas", len(call.get("sigmas", ())) - 1, max_steps, " steps")
    _at_most("num_inference_steps", call.get("num_inference_steps", 1), max_steps)
    _at_most("evaluations of the denoiser", _evaluations(call, own_steps), max_steps)
    _at_most("fps", call.get("fps", 1), MAX_FPS)
    _at_most("num_videos_per_prompt", call.get("num_videos_per_prompt", 1), max_videos)
    output_type = _text(given["output_type"]) if "output_type" in given else "mp4"
    if output_type not in TRITON_OUTPUT_TYPES:
        raise SettingsError(
            "output_type",
            expected=" or ".join(TRITON_OUTPUT_TYPES),
            got=repr(output_type),
            remedy="Choose one of these.",
        )
    preview_every = given["preview_every"].item() if "preview_every" in given else 0
    at_least("preview_every", preview_every, 0)
    image, seed = call.pop(IMAGE.name), call.pop(SEED.name, None)
    return Request(image, secrets.randbits(64) if seed is None else seed, output_type, preview_every, call)


def _evaluations(call: Mapping[str, Any], own_steps: int) -> int:
    """At most so many: two a step for some samplers.  An unknown one is the engine's to refuse."""
    steps: int = len(call["sigmas"]) - 1 if "sigmas" in call else call.get("num_inference_steps", own_steps)
    sampler = SAMPLERS.get(call.get("sampler", Settings.sampler))
    return steps * sampler.evaluations if sampler else 0


def _at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise SettingsError(
            name,
            expected=f"at most {limit}{unit}",
            got=str(value),
            remedy="Ask for less.",
        )
