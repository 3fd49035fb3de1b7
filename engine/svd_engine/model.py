"""What everything downstream of a checkpoint needs to know of it: constants, no weights, no torch.

Plain types only, because a bundle's manifest holds a `Model` too.
"""

from __future__ import annotations

from dataclasses import dataclass

from svd_engine.networks.spec import Architecture


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str  # "svd-xt", or the name of the folder or hub repository
    architecture: Architecture
    frames: int  # of the videos that it was trained on
    height: int  # pixels, native size
    width: int  # pixels
    sigma_min: float  # noise levels of the Karras schedule
    sigma_max: float
    rho: float = 7.0  # Karras et al. 2022, eq. 5; diffusers holds it constant
    latent_scale: float  # the decoder takes latents divided by this
    clip_mean: tuple[float, float, float]  # of RGB in [0, 1]
    clip_std: tuple[float, float, float]
    random_weights: bool
    min_guidance_scale: float = 1.0  # of a call that names none: SVD's are diffusers' defaults
    max_guidance_scale: float = 3.0
