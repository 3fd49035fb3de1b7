"""What a user may ask of one generation, with ranges.  Knows no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svd_engine.errors import SettingsError


@dataclass(frozen=True)
class Settings:
    """Every number of a call.  Raises SettingsError for one that is out of range."""

    frames: int
    height: int  # pixels
    width: int  # pixels
    steps: int = 25
    sigmas: tuple[float, ...] | None = None  # a caller's own noise levels replace `steps`
    min_guidance_scale: float = 1.0  # of the first frame
    max_guidance_scale: float = 3.0  # of the last frame; at most 1 means no guidance
    fps: int = 7
    motion_bucket_id: int = 127  # 0..1023; SVD was trained on 0..255, more is more motion
    noise_aug_strength: float = 0.02  # std of the noise on the first frame, pixels in [-1, 1]
    decode_chunk_size: int | None = None  # frames per decoder call; None: all at once
    videos_per_image: int = 1

    def __post_init__(self) -> None:
        at_least("num_frames", self.frames, 1)
        at_least("height", self.height, 1)
        at_least("width", self.width, 1)
        at_least("num_inference_steps", self.steps, 1)
        at_least("fps", self.fps, 1)
        at_least("num_videos_per_prompt", self.videos_per_image, 1)
        if self.decode_chunk_size is not None:
            at_least("decode_chunk_size", self.decode_chunk_size, 1)
        at_least("motion_bucket_id", self.motion_bucket_id, 0)
        if self.motion_bucket_id > 1023:
            raise _refusal("motion_bucket_id", "0 to 1023", self.motion_bucket_id)
        _finite("noise_aug_strength", self.noise_aug_strength)
        if self.noise_aug_strength < 0:
            raise _refusal("noise_aug_strength", "0 or more", self.noise_aug_strength)
        _finite("min_guidance_scale", self.min_guidance_scale)
        _finite("max_guidance_scale", self.max_guidance_scale)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance acts: `do_classifier_free_guidance` in diffusers."""
        return self.max_guidance_scale > 1

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


def check_seed(seed: int) -> None:
    """torch's generators take 64 bits, and wrap negative seeds around.  Raises SettingsError."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise _refusal("seed", "a whole number from 0 to 2^64 - 1", seed)


def at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise _refusal(name, f"a whole number of at least {low}", value)


def _finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _refusal(name, "a finite number", value)


def _refusal(name: str, expected: str, got: object) -> SettingsError:
    return SettingsError(name, expected=expected, got=repr(got), remedy="Pass a value in this range.")
