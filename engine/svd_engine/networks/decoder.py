"""What turns latents back into pixels: a VAE's decoder, temporal or of single images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svd_engine.spec.network import OnPart, unheard

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder


class VaeDecoder(nn.Module):
    """Latent of T consecutive frames of one video [T,4,h,w] -> frames [T,3,H,W], about [-1, 1], float32.

    The latent is already divided by the VAE's scaling factor.  Holds only the decoder of diffusers'
    AutoencoderKLTemporalDecoder; its image indicator is zero, because every frame belongs to a video.
    """

    def __init__(self, vae: AutoencoderKLTemporalDecoder) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        frames, dtype = latent.shape[0], next(self.decoder.parameters()).dtype
        video = torch.zeros(1, frames, dtype=dtype, device=latent.device)
        decoded: Tensor = self.decoder(latent.to(dtype), num_frames=frames, image_only_indicator=video)
        return decoded.float()


class ImageVaeDecoder(nn.Module):
    """As `VaeDecoder`, where each frame is decoded as an image: the other half of diffusers' AutoencoderKL.

    slice_frames: frames at a time, for less memory and with the same result; None takes all at once.
    Source: AutoencoderKL._decode.
    """

    def __init__(self, vae: AutoencoderKL, slice_frames: int | None = None) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.slice_frames = slice_frames

    def forward(self, latent: Tensor, on_part: OnPart = unheard) -> Tensor:
        """on_part: is told after each slice; a part is a frame."""
        if self.slice_frames is None:
            return self.decoded(latent)
        frames: list[Tensor] = []
        for start in range(0, len(latent), self.slice_frames):
            frames.append(self.decoded(latent[start : start + self.slice_frames]))
            on_part(min(start + self.slice_frames, len(latent)), len(latent))
        return torch.cat(frames)

    def decoded(self, latent: Tensor) -> Tensor:
        dtype = next(self.decoder.parameters()).dtype
        images: Tensor = self.decoder(self.post_quant_conv(latent.to(dtype)))
        return images.float()
