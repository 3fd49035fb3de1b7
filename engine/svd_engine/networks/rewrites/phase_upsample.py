"""Nearest upsampling by two and a 3x3 convolution as four 2x2 convolutions of the small image.

With u[j] = x[j // 2] in one dimension, and taps w of a 3-convolution of u with zero padding,

    y[2i]     = w[0] u[2i-1] + w[1] u[2i]   + w[2] u[2i+1] = w[0] x[i-1] + (w[1] + w[2]) x[i]
    y[2i + 1] = w[0] u[2i]   + w[1] u[2i+1] + w[2] u[2i+2] = (w[0] + w[1]) x[i] + w[2] x[i+1]

and in two dimensions the four phases of y are four 2x2 convolutions of x, zero padded on the side that
they read: 4 x 4 products where there were 4 x 9, and the upsampled image is never made.  In diffusers:
Upsample2D with interpolation and a 3x3 convolution, in every up block of the UNet and of TemporalDecoder
but the last.

Precondition on the call: upsampling to exactly twice the size.
"""

from __future__ import annotations

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, parts, rewrite_each
from svd_engine.networks.rewrites._upsampling import check_doubled, convolution, obstacle

SUMS = ((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0))  # [phase][tap of 2][tap of 3]


def apply(network: nn.Module) -> Report:
    return rewrite_each(parts(network, Upsample2D), obstacle, PhaseUpsample, network)


class PhaseUpsample(nn.Module):
    """[N,C,h,w] -> [N,C',2h,2w], the call of Upsample2D.  Raises TensorMismatch for another size."""

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        conv = convolution(upsample)
        assert isinstance(conv, nn.Conv2d)  # no obstacle
        sums = torch.tensor(SUMS, dtype=torch.float64, device=conv.weight.device)
        phases = torch.einsum("pay,qbx,oiyx->pqoiab", sums, sums, conv.weight.double()).flatten(0, 1)
        rounded = (phase.to(conv.weight.dtype, copy=True) for phase in phases)
        self.weights = nn.ParameterList(frozen(phase) for phase in rounded)  # [out, in, 2, 2] each
        self.bias = None if conv.bias is None else frozen(conv.bias)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        check_doubled(hidden_states, output_size, "phase-upsample")
        x, quarters = hidden_states, []
        for phase, weight in enumerate(self.weights):
            below, right = divmod(phase, 2)  # which side of its pixel a phase reads
            padded = F.pad(x, (1 - right, right, 1 - below, below))
            quarters.append(F.conv2d(padded, weight, self.bias))
        return interleaved(quarters)


def interleaved(quarters: list[Tensor]) -> Tensor:
    """Phases (0,0), (0,1), (1,0), (1,1) of an image, [N,C,h,w] each -> [N,C,2h,2w]; empties the list."""
    if not quarters[0].is_contiguous(memory_format=torch.channels_last):
        joined = torch.stack(quarters, 2).flatten(1, 2)  # [N, C*4, h, w]
        quarters.clear()
        return F.pixel_shuffle(joined, 2)
    joined = torch.cat(quarters, 1).permute(0, 2, 3, 1)  # [N, h, w, 4*C], dense
    quarters.clear()
    grid: Tensor = joined.unflatten(3, (2, 2, -1)).transpose(2, 3)  # [N, h, 2, w, 2, C]
    return grid.flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)
