"""What everything downstream of a checkpoint needs to know of it: constants, no weights, no torch.

Plain types only, because a bundle's manifest holds a `Model` too.
"""

from __future__ import annotations

from dataclasses import dataclass

from svd_engine.bounds import ChannelMean, Divisor, Finite, Frames, NoiseLevel, Pixels, Rho
from svd_engine.networks.spec import Architecture


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str  # "svd-xt", or the name of the folder or hub repository
    architecture: Architecture
    frames: Frames  # of the videos that it was trained on
    height: Pixels  # native size
    width: Pixels
    sigma_min: NoiseLevel  # noise levels of the Karras schedule
    sigma_max: NoiseLevel  # above sigma_min
    rho: Rho = 7.0  # Karras et al. 2022, eq. 5; diffusers holds it constant
    latent_scale: Divisor  # the decoder takes latents divided by this
    clip_mean: tuple[ChannelMean, ChannelMean, ChannelMean]  # of RGB in [0, 1]
    clip_std: tuple[Divisor, Divisor, Divisor]
    random_weights: bool
    min_guidance_scale: Finite = 1.0  # of a call that names none: SVD's are diffusers' defaults
    max_guidance_scale: Finite = 3.0
