"""A convolution over frames on short rows of pixels.

    conv2d(x as [B, C, F, h*w], kernel (k,1))
        = conv2d(x as [B, C, F*r, h*w/r], kernel (k,1), dilation (r,1), padding (p*r,0))

for any r that divides h*w: the pixel that lay one row below, in the next frame, lies r rows below.  Both
views are free.  A CPU's convolution works row after row, over all channels; with h*w pixels in a row, 32,768
of them at 128x256, what it has read and summed leaves the cache before it is used again.  In diffusers: as
temporal-conv2d, after which it is applied.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, parts, rewrite_each
from svd_engine.networks.rewrites.temporal_conv2d import TemporalConv2d

LONGEST = 128  # pixels of a row


def apply(network: nn.Module) -> Report:
    places = [(p, conv) for p, conv in parts(network, TemporalConv2d) if type(conv) is TemporalConv2d]
    return rewrite_each(places, lambda _: None, rewrite, network)


def rewrite(conv: TemporalConv2d) -> None:
    conv.__class__ = TemporalRows


class TemporalRows(TemporalConv2d):
    """Takes the call of the convolution it was."""

    def convolve(self, x: Tensor) -> Tensor:
        frames, pixels = x.shape[2:]
        width = next(width for width in range(min(pixels, LONGEST), 0, -1) if pixels % width == 0)
        rows = pixels // width
        y = F.conv2d(
            x.unflatten(3, (rows, width)).flatten(2, 3), self.weight, self.bias,
            padding=(self.padding[0] * rows, 0), dilation=(rows, 1),
        )  # fmt: skip
        return y.unflatten(2, (frames, rows)).flatten(3)  # type: ignore[no-any-return]
