"""A convolution over frames only is a two-dimensional one over frames and flattened pixels.

    conv3d(x, W, kernel (k,1,1)) = conv2d(x as [B, C, F, h*w], W as [out, in, k, 1], kernel (k,1))

because each output pixel reads that pixel of k frames and nothing else.  Both views are free, and conv2d
has far better kernels than conv3d.  In diffusers: conv1, conv2 (and conv_shortcut, where there is one) of
TemporalResnetBlock, and time_conv_out of TemporalDecoder.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, parts, rewrite_each


def apply(network: nn.Module) -> Report:
    return rewrite_each(parts(network, nn.Conv3d), obstacle, TemporalConv2d, network)


def obstacle(conv: nn.Conv3d) -> str | None:
    if conv.kernel_size[1:] != (1, 1):
        return f"its kernel {conv.kernel_size} mixes pixels"
    if conv.stride != (1, 1, 1) or conv.dilation != (1, 1, 1) or conv.groups != 1:
        return "it has a stride, a dilation or groups"
    if isinstance(conv.padding, str) or conv.padding[1:] != (0, 0) or conv.padding_mode != "zeros":
        return "its padding is not zeros before and after the frames"
    return None


class TemporalConv2d(nn.Module):
    """[B,C,F,h,w] -> [B,C',F,h,w], the call of the Conv3d it replaces."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = frozen(conv.weight.squeeze(-1))  # [out, in, k, 1]
        self.bias = None if conv.bias is None else frozen(conv.bias)
        self.padding = (int(conv.padding[0]), 0)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.flatten(3), self.weight, self.bias, padding=self.padding)
        return y.unflatten(3, x.shape[3:])
