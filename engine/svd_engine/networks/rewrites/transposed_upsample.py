"""Nearest upsampling by two and a 3x3 convolution as one transposed 4x4 convolution of stride two.

With u[j] = x[j // 2] in one dimension, taps w of a 3-convolution of u with zero padding, and a transposed
convolution of stride 2 and padding 1, y[o] = sum over i of x[i] k[o - 2i + 1],

    y[2i]     = w[0] x[i-1] + (w[1] + w[2]) x[i]   = k[3] x[i-1] + k[1] x[i]
    y[2i + 1] = (w[0] + w[1]) x[i] + w[2] x[i+1]   = k[2] x[i]   + k[0] x[i+1]

so k = (w[2], w[1] + w[2], w[0] + w[1], w[0]), and in two dimensions its product of rows and columns: the
products of phase-upsample, 16 where there were 36, in one convolution whose output needs no interleaving.
TensorRT has a kernel for it that writes the memory order of the group normalisation after it, where it takes
a copy to interleave the four images of phase-upsample.  In diffusers: Upsample2D with interpolation and a 3x3
convolution, in every up block of the UNet and of TemporalDecoder but the last.

Precondition on the call: upsampling to exactly twice the size.
"""

from __future__ import annotations

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, parts, rewrite_each
from svd_engine.networks.rewrites._upsampling import check_doubled, convolution
from svd_engine.networks.rewrites._upsampling import obstacle as obstacle_to_doubling

TAPS = (0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0)  # [tap of 4][tap of 3]


def apply(network: nn.Module) -> Report:
    return rewrite_each(parts(network, Upsample2D), obstacle, TransposedUpsample, network)


def obstacle(upsample: Upsample2D) -> str | None:
    conv = convolution(upsample)
    if isinstance(conv, nn.Conv2d) and conv.weight.dtype == torch.bfloat16:
        return "its weights are bfloat16, in which compilers have no transposed convolution"
    return obstacle_to_doubling(upsample)


class TransposedUpsample(nn.Module):
    """[N,C,h,w] -> [N,C',2h,2w], the call of Upsample2D.  Raises TensorMismatch for another size."""

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        conv = convolution(upsample)
        assert isinstance(conv, nn.Conv2d)  # no obstacle
        sums = torch.tensor(TAPS, dtype=torch.float64, device=conv.weight.device)
        kernel = torch.einsum("ay,bx,oiyx->ioab", sums, sums, conv.weight.double())
        self.weight = frozen(kernel.to(conv.weight.dtype).contiguous())  # [in, out, 4, 4]
        self.bias = None if conv.bias is None else frozen(conv.bias)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        check_doubled(hidden_states, output_size, "transposed-upsample")
        return F.conv_transpose2d(hidden_states, self.weight, self.bias, stride=2, padding=1)
