"""What the denoiser is given of images, for callers that have encoders of their own.

Letters in shapes: h w latent pixels, C latent channels (4), D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svd_engine.errors import SettingsError
from svd_engine.spec.model import Architecture


@dataclass(frozen=True, eq=False)
class ImageConditioning:
    """What stands in the place of images in a call: what their two encoders gave.

        engine(ImageConditioning(embedding, first_latent), output_type="latent")

    embedding: [images, 1, D], CLIP's projection of each image (SVD: D is 1024).  first_latent:
    [images, C, h, w], what the VAE encodes each image with its noise to, not multiplied by the model's scale.
    Of any floating dtype, on any device, as `pixels`: what the VAE encoded, [images, 3, H, W] in [-1, 1], for
    previews alone, whose colours are fitted to it.

    A call opens and runs no encoder then, and draws no noise for the image (`noise_aug_strength` is what the
    network is told of the noise that there is already); the last frame of SV3D is the network's own.  A
    memory budget counts the encoders all the same.
    """

    embedding: Tensor
    first_latent: Tensor
    pixels: Tensor | None = None

    @property
    def images(self) -> int:
        return len(self.embedding)

    def fitted(
        self, architecture: Architecture, height: int, width: int, device: torch.device
    ) -> ImageConditioning:
        """As float32 on `device`.  height, width: of the video, in pixels.

        Raises SettingsError unless all are finite real tensors of the shapes that the networks take.
        """
        images = len(self.embedding) if isinstance(self.embedding, Tensor) and self.embedding.dim() else 1
        scale, channels = architecture.vae_scale, architecture.latent_channels
        latent = (images, channels, height // scale, width // scale)
        pixels = self.pixels
        return ImageConditioning(
            _checked("embedding", self.embedding, (images, 1, architecture.embedding_dim), device),
            _checked("first_latent", self.first_latent, latent, device),
            None if pixels is None else _checked("pixels", pixels, (images, 3, height, width), device),
        )


def _checked(name: str, given: object, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(given, Tensor) or given.shape != shape or not len(given):
        raise SettingsError(
            f"{name} of an ImageConditioning",
            expected=f"a tensor {list(shape)}" if shape[0] else "one image or more",
            got=f"{list(given.shape)}" if isinstance(given, Tensor) else f"no tensor: {type(given).__name__}",
            remedy="Encode the images with this model's own encoders, at the height and width of the video.",
        )
    if not given.is_floating_point() or not bool(given.isfinite().all()):
        raise SettingsError(
            f"{name} of an ImageConditioning",
            expected="finite real numbers",
            got="NaN or infinity in them" if given.is_floating_point() else str(given.dtype),
            remedy="Encode the images in a precision that holds them: of SVD's VAE that is float32.",
        )
    return given.to(device, torch.float32)
