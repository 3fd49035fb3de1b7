"""When diffusers' Upsample2D is nearest upsampling by two and a plain 3x3 convolution."""

from __future__ import annotations

from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from svd_engine.errors import TensorMismatch
from svd_engine.networks.rewrites._places import is_plain_3x3


def obstacle(upsample: Upsample2D) -> str | None:
    conv = convolution(upsample)
    if not upsample.interpolate or upsample.norm is not None or not isinstance(conv, nn.Conv2d):
        return "it is not interpolation followed by a convolution"
    if not is_plain_3x3(conv):
        return f"its convolution is not a plain 3x3 one with zero padding of 1: {conv}"
    return None


def convolution(upsample: Upsample2D) -> nn.Module | None:
    layer: nn.Module | None = upsample.conv if upsample.name == "conv" else upsample.Conv2d_0
    return layer


def check_doubled(x: Tensor, output_size: tuple[int, int] | None, rewrite: str) -> None:
    """Raises TensorMismatch when [N,C,h,w] is to be upsampled to another size than twice its own."""
    doubled = (2 * x.shape[2], 2 * x.shape[3])
    if output_size is not None and tuple(output_size) != doubled:
        raise TensorMismatch(
            f"upsampling of a {x.shape[2]}x{x.shape[3]} latent",
            expected=f"{doubled[0]}x{doubled[1]}, twice the size",
            got=f"{output_size[0]}x{output_size[1]}",
            remedy=f"Use a height and width that are multiples of 64, or switch {rewrite} off.",
        )
