"""3x3 convolutions of many channels as four 1x3 convolutions of half the rows: 12 products instead of 18.

With x the rows of an image, zero outside, and w the rows of a kernel, each row of y and each product a
1x3 convolution (Winograd's F(2,3); Lavin and Gray, arXiv 1509.09308, section 4.1, in one dimension):

    m0 = w[0]                     (x[2i-1] - x[2i+1])        y[2i]     = m0 + m1 + m2
    m1 = (w[0] + w[1] + w[2]) / 2 (x[2i]   + x[2i+1])        y[2i + 1] = m1 - m2 - m3
    m2 = (w[0] - w[1] + w[2]) / 2 (x[2i+1] - x[2i])
    m3 = w[2]                     (x[2i]   - x[2i+2])

The sums of rows cost as much for few channels as for many, so convolutions of less than LEAST channels stay.
In diffusers: conv1 and conv2 of ResnetBlock2D in TemporalDecoder.  The UNet is not touched: the weights grow
by a third, and a step's peak memory is its weights.

Differences are convolutions of each channel here, of the rows and by -1: ONNX Runtime keeps the layout of its
convolutions through these and through sums, and would copy for a subtraction.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, is_plain_3x3, parts, rewrite_each

LEAST = 256  # channels, in and out
# [m][row of four, from 2i-1 on] and [m][row of the kernel]
OF_IMAGE = (1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0)
OF_KERNEL = (1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, -1.0)  # m3 is added


def apply(network: nn.Module) -> Report:
    convs = parts(network, nn.Conv2d) if isinstance(network, TemporalDecoder) else []
    places = [(path, conv) for path, conv in convs if min(conv.in_channels, conv.out_channels) >= LEAST]
    return rewrite_each([p for p in places if p[1].kernel_size == (3, 3)], obstacle, WinogradRows, network)


def obstacle(conv: nn.Conv2d) -> str | None:
    return None if is_plain_3x3(conv) else f"it is not a plain 3x3 one with zero padding of 1: {conv}"


class WinogradRows(nn.Module):
    """[N,C,h,w] -> [N,C',h,w], the call of the convolution it replaces."""

    rows: Tensor  # [4,C,1,4,1]
    minus: Tensor  # [C',1,1,1]

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight
        sums = torch.tensor(OF_KERNEL, dtype=torch.float64, device=weight.device)
        kernels = torch.einsum("my,oiyx->moix", sums, weight.double()).unsqueeze(3)
        rounded = (kernel.to(weight.dtype, copy=True) for kernel in kernels)
        self.weights = nn.ParameterList(frozen(kernel) for kernel in rounded)  # [out,in,1,3] each
        self.bias = None if conv.bias is None else frozen(conv.bias)
        sides = torch.tensor(OF_IMAGE, dtype=weight.dtype, device=weight.device)
        self.register_buffer("rows", sides[:, None, None, :, None].repeat(1, conv.in_channels, 1, 1, 1))
        self.register_buffer("minus", weight.new_full((conv.out_channels, 1, 1, 1), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        channels, height = x.shape[1:3]
        if height % 2:
            x = F.pad(x, (0, 0, 0, 1))
        m0, m1, m2, m3 = (
            F.conv2d(
                F.conv2d(x, rows, stride=(2, 1), padding=(1, 0), groups=channels),
                weight,
                self.bias if number == 1 else None,  # m1 is in every row
                padding=(0, 1),
            )
            for number, (rows, weight) in enumerate(zip(self.rows, self.weights, strict=True))
        )
        even = m0 + (m1 + m2)
        odd = m3 + (m1 + F.conv2d(m2, self.minus, groups=len(self.minus)))
        joined = torch.stack([even, odd], 3).flatten(2, 3)
        return joined[:, :, :height] if height % 2 else joined
