"""The products of feed-forwards as 1x1 convolutions, on images of a few hundred tokens.

    W x_n + b for tokens n = 1 ... N   =   conv2d(x as [N/L, C, L, 1], W as [out, C, 1, 1], b)

The same products.  ONNX Runtime's convolutions on a CPU write blocks of channels of one image after the
other, so that an image's value and gate, four times as wide as its tokens, are written, multiplied and read
in cache; its matrix products write them for all tokens first.  L is the largest divisor of N up to
MOST_TOKENS.  In diffusers: every FeedForward in SVD's transformers, after split-geglu.
"""

from __future__ import annotations

from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, parts, pointwise, rewrite_each
from svd_engine.networks.rewrites.split_geglu import SplitGEGLU

MOST_TOKENS = 512  # tokens of an image


def apply(network: nn.Module) -> Report:
    return rewrite_each(parts(network, FeedForward), obstacle, FeedForwardConvolutions, network)


def obstacle(feed_forward: FeedForward) -> str | None:
    first = feed_forward.net[0]
    if not isinstance(first, SplitGEGLU):
        return f"its first layer is {type(first).__name__}, not two products as split-geglu makes them"
    return None


class FeedForwardConvolutions(nn.Module):
    """[..., C] -> [..., C], the call of the FeedForward it replaces."""

    def __init__(self, feed_forward: FeedForward) -> None:
        super().__init__()
        split, out = feed_forward.net[0], feed_forward.net[2]  # beside them dropout
        self.value, self.gate, self.out = map(pointwise, (split.value, split.gate, out))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        length = next(length for length in range(min(tokens, MOST_TOKENS), 0, -1) if tokens % length == 0)
        images = x.reshape(-1, length, 1, x.shape[-1]).permute(0, 3, 1, 2)
        y: Tensor = self.out(F.gelu(self.gate(images)) * self.value(images))
        return y.permute(0, 2, 3, 1).reshape(x.shape)
