"""What everything downstream of a checkpoint needs to know of it: constants, no weights, no torch.

Plain types only, because a bundle's manifest holds a `Model` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd_engine.spec.bounds import (
    ChannelMean,
    Channels,
    ClipPixels,
    Divisor,
    Frames,
    GuidanceScale,
    LatentChannels,
    NoiseLevel,
    Pixels,
    PixelScale,
    Rho,
    Steps,
    Text,
)
from svd_engine.spec.conditioning import Conditioning, svd_conditioning

GuiderName = Literal["linear", "constant", "triangle", "trapezoid"]

SVD = svd_conditioning()


@dataclass(frozen=True)
class Architecture:
    """What the tensor tables need to know of a checkpoint's networks.  Defaults are SVD's."""

    clip_size: ClipPixels = 224  # pixels, height and width of the image encoder's input
    embedding_dim: Channels = 1024
    latent_channels: LatentChannels = 4
    vae_scale: PixelScale = 8  # pixels per latent pixel
    size_multiple: PixelScale = 64  # pixels: vae_scale times the UNet's own downsampling
    conditioning: Conditioning = SVD  # what the denoiser is told beside the image


@dataclass(frozen=True, kw_only=True)
class Model:
    name: Text  # "svd-xt", or the name of the folder or hub repository
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
    min_guidance_scale: GuidanceScale = 1.0  # of a call that names none: SVD's are diffusers' defaults
    max_guidance_scale: GuidanceScale = 3.0
    guider: GuiderName = "linear"  # as the guidance scales, and the steps
    steps: Steps = 25
    # The camera goes around an object and arrives at the photograph's view, as SV3D's does: the last frame is
    # the photograph, and an alpha channel of that says what the object is.
    orbits: bool = False

    @property
    def noise_aug_strength(self) -> float:
        """Of a call that names none."""
        return self.architecture.conditioning.defaults.get("noise_aug_strength", 0.02)

    @property
    def family(self) -> str:
        """SVD, SV3D_u or SV3D_p, by what it is told."""
        if not self.orbits:
            return "SVD"
        return "SV3D_p" if self.architecture.conditioning.per_frame else "SV3D_u"
