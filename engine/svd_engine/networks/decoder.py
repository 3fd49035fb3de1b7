"""What turns latents back into pixels: the temporal VAE decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder


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
