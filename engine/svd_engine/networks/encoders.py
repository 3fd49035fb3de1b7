"""What turns the photograph into conditioning: the CLIP image encoder and the VAE encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionModelWithProjection


class ImageEncoder(nn.Module):
    """CLIP vision tower with projection: normalised pixels [B,3,S,S] -> embedding [B,1,D], float32."""

    def __init__(self, clip: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(self.clip.parameters()).dtype
        embedding: Tensor = self.clip(pixel_values=pixels.to(dtype)).image_embeds
        return embedding[:, None].float()


class VaeEncoder(nn.Module):
    """Pixels in [-1, 1] [B,3,H,W] -> mode of the latent distribution [B,4,h,w], unscaled, float32.

    Holds only the encoder's half of diffusers' VAE, which is the same in both.  It must be float32:
    SVD's encoder overflows in float16 (`force_upcast` in the checkpoint's config).
    """

    def __init__(self, vae: AutoencoderKL | AutoencoderKLTemporalDecoder) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, pixels: Tensor) -> Tensor:
        moments: Tensor = self.quant_conv(self.encoder(pixels))
        return moments.chunk(2, dim=1)[0]  # the mean; DiagonalGaussianDistribution.mode
