"""The inputs of one request: names and defaults of diffusers' call, Triton's types, and what they become.

Knows numpy arrays, not Triton's classes.  What is absent keeps the default of `VideoEngine.__call__`.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from svd_engine.errors import SettingsError
from svd_engine.settings import at_least


@dataclass(frozen=True)
class Tensor:
    """An input or output as config.pbtxt states it; -1 is any length."""

    name: str
    datatype: str  # Triton's
    dims: tuple[int, ...] = (1,)
    optional: bool = False  # inputs only


def _optional(name: str, datatype: str, *dims: int) -> Tensor:
    return Tensor(name, datatype, dims or (1,), optional=True)


SAMPLING = (
    _optional("height", "TYPE_INT32"),
    _optional("width", "TYPE_INT32"),
    _optional("num_frames", "TYPE_INT32"),
    _optional("num_inference_steps", "TYPE_INT32"),
    _optional("sigmas", "TYPE_FP32", -1),
    _optional("min_guidance_scale", "TYPE_FP32"),
    _optional("max_guidance_scale", "TYPE_FP32"),
    _optional("fps", "TYPE_INT32"),
    _optional("motion_bucket_id", "TYPE_FP32"),
    _optional("noise_aug_strength", "TYPE_FP32"),
    _optional("decode_chunk_size", "TYPE_INT32"),
    _optional("num_videos_per_prompt", "TYPE_INT32"),
    _optional("latents", "TYPE_FP32", -1, -1, -1, -1, -1),
)
IMAGE = Tensor("image", "TYPE_STRING")
SEED = _optional("seed", "TYPE_UINT64")
OUTPUT_TYPE = _optional("output_type", "TYPE_STRING")
FIT = _optional("fit", "TYPE_STRING")
PREVIEW_EVERY = _optional("preview_every", "TYPE_INT32")
OUTPUT_TYPES = ("mp4", "frames")
DEFAULT_FPS = 7
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
        return int(self.sampling.get("fps", DEFAULT_FPS))


def read(given: Mapping[str, np.ndarray], max_steps: int, max_videos: int) -> Request:
    """`given` holds the tensors that the client sent.  Raises SettingsError.

    The two limits keep one request from holding an instance for hours; everything else that costs time or
    memory is bounded by the bundle's static profiles.
    """
    if "image" not in given:
        raise SettingsError(
            "image",
            expected="an encoded picture in the input of this name",
            got=f"the inputs {', '.join(given)}",
            remedy="Send a JPEG, PNG or WebP file's content.",
        )
    sampling: dict[str, Any] = {}
    for tensor in SAMPLING:
        if tensor.name in given:
            values = given[tensor.name]
            sampling[tensor.name] = values.item() if tensor.dims == (1,) else values
    if "sigmas" in sampling:
        sampling["sigmas"] = sampling["sigmas"].tolist()
        _at_most("sigmas", len(sampling["sigmas"]) - 1, max_steps, " steps")
    _at_most("num_inference_steps", sampling.get("num_inference_steps", 1), max_steps)
    _at_most("fps", sampling.get("fps", 1), MAX_FPS)
    _at_most("num_videos_per_prompt", sampling.get("num_videos_per_prompt", 1), max_videos)
    output_type = _text(given, "output_type", "mp4")
    if "fit" in given:
        sampling["fit"] = _text(given, "fit", "")
    if output_type not in OUTPUT_TYPES:
        raise SettingsError(
            "output_type",
            expected=" or ".join(OUTPUT_TYPES),
            got=repr(output_type),
            remedy="Choose one of these.",
        )
    preview_every = given["preview_every"].item() if "preview_every" in given else 0
    at_least("preview_every", preview_every, 0)
    seed = given["seed"].item() if "seed" in given else secrets.randbits(64)
    return Request(given["image"].item(), seed, output_type, preview_every, sampling)


def _text(given: Mapping[str, np.ndarray], name: str, default: str) -> str:
    return str(given[name].item().decode(errors="replace")) if name in given else default


def _at_most(name: str, value: int, limit: int, unit: str = "") -> None:
    if value > limit:
        raise SettingsError(
            name,
            expected=f"at most {limit}{unit}",
            got=str(value),
            remedy="Ask for less.",
        )
