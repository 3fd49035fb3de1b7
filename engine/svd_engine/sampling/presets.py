"""Settings that others recommend, as arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from svd_engine.errors import SettingsError

if TYPE_CHECKING:
    from svd_engine.spec.model import Model

# Frames that SVD was trained on: steps, guidance scales of the first and the last frame
STABILITY = {14: (25, 1.0, 2.5), 25: (30, 1.5, 3.0)}


def sgm(model: Model) -> dict[str, Any]:
    """Those of Stability's own scripts for SVD (14 frames) and SVD-XT (25); SV3D has them already.

    Source: `scripts/sampling/simple_video_sample.py` of Stability-AI/generative-models.
    Raises SettingsError for a model of other frames.
    """
    if model.orbits:
        return {}
    if model.frames not in STABILITY:
        raise SettingsError(
            'preset "sgm"',
            expected="a model of 14 frames, as SVD, or of 25, as SVD-XT",
            got=f"{model.name}, of {model.frames}",
            remedy="Pass num_inference_steps, min_guidance_scale and max_guidance_scale yourself.",
        )
    steps, low, high = STABILITY[model.frames]
    return {"num_inference_steps": steps, "min_guidance_scale": low, "max_guidance_scale": high}


def animatelcm(_model: Model) -> dict[str, Any]:
    """Those of AnimateLCM-SVD, a UNet that was distilled for few steps, of any frames.

    Without guidance, which halves the work of a step: such a call takes the "single" profile.
    Source: `animatelcm_svd/batch_inference.py` of G-U-N/AnimateLCM.
    """
    return {
        "num_inference_steps": 4,
        "sampler": "lcm",
        "schedule": "lcm",
        "min_guidance_scale": 1.0,
        "max_guidance_scale": 1.0,
    }


PRESETS: Mapping[str, Callable[[Model], dict[str, Any]]] = {"sgm": sgm, "animatelcm": animatelcm}
