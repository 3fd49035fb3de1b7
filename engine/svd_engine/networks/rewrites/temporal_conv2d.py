"""A convolution over frames only is a two-dimensional one over frames and flattened pixels.

    conv3d(x, W, kernel (k,1,1)) = conv2d(x as [B, C, F, h*w], W as [out, in, k, 1], kernel (k,1))

because each output pixel reads that pixel of k frames and nothing else.  Both views are free, and conv2d
has far better kernels than conv3d.  In diffusers: conv1, conv2 (and conv_shortcut, where there is one) of
TemporalResnetBlock, and time_conv_out of TemporalDecoder.
"""

from __future__ import annotations

from diffusers.models.resnet import SpatioTemporalResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, parts, rewrite_each
from svd_engine.networks.rewrites._resnets import adopt_resnet, obstacle_to_adoption

IN_RESNETS = ("conv1", "conv2", "conv_shortcut")


def apply(network: nn.Module) -> Report:
    resnets = [
        (path, resnet)
        for path, resnet in parts(network, SpatioTemporalResBlock)
        if isinstance(resnet.temporal_res_block.conv1, nn.Conv3d)
    ]
    inside = tuple(f"{path}.temporal_res_block." for path, _ in resnets)
    others = [(path, conv) for path, conv in parts(network, nn.Conv3d) if not path.startswith(inside)]
    before = len(parts(network, TemporalConv2d))
    in_resnets = rewrite_each(resnets, obstacle_in_resnet, rewrite_resnet, network)
    elsewhere = rewrite_each(others, obstacle, TemporalConv2d, network)
    return Report(len(parts(network, TemporalConv2d)) - before, in_resnets.left_alone + elsewhere.left_alone)


def obstacle_in_resnet(resnet: SpatioTemporalResBlock) -> str | None:
    """All convolutions of a resnet or none: they hand each other flat pixels."""
    reasons = [reason for conv in convolutions(resnet) if (reason := obstacle(conv)) is not None]
    return obstacle_to_adoption(resnet) or next(iter(reasons), None)


def obstacle(conv: nn.Conv3d) -> str | None:
    if conv.kernel_size[1:] != (1, 1):
        return f"its kernel {conv.kernel_size} mixes pixels"
    if conv.stride != (1, 1, 1) or conv.dilation != (1, 1, 1) or conv.groups != 1:
        return "it has a stride, a dilation or groups"
    if isinstance(conv.padding, str) or conv.padding[1:] != (0, 0) or conv.padding_mode != "zeros":
        return "its padding is not zeros before and after the frames"
    return None


def rewrite_resnet(resnet: SpatioTemporalResBlock) -> None:
    adopt_resnet(resnet).flat_pixels = True
    temporal = resnet.temporal_res_block
    for name in IN_RESNETS:
        if getattr(temporal, name) is not None:
            setattr(temporal, name, TemporalConv2d(getattr(temporal, name)))


def convolutions(resnet: SpatioTemporalResBlock) -> list[nn.Conv3d]:
    named = [getattr(resnet.temporal_res_block, name) for name in IN_RESNETS]
    return [conv for conv in named if conv is not None]


class TemporalConv2d(nn.Module):
    """[B,C,F,h*w] -> [B,C',F,h*w], or [B,C,F,h,w] -> [B,C',F,h,w] as the Conv3d it replaces."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = frozen(conv.weight.squeeze(-1))  # [out, in, k, 1]
        self.bias = None if conv.bias is None else frozen(conv.bias)
        self.padding = (int(conv.padding[0]), 0)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 5:
            return self.convolve(x.flatten(3)).unflatten(3, x.shape[3:])  # type: ignore[no-any-return]
        return self.convolve(x)

    def convolve(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)
