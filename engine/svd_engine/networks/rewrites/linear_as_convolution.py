"""A linear layer on tokens is a 1x1 convolution on an image one pixel wide.

    W x_n + b for tokens n = 1 ... L   =   conv2d(x as [N, C, L, 1], W as [out, C, 1, 1], b)

The same products in the same memory: tokens [N,L,C] are that image in channels-last order.  It changes
which library torch calls on a CPU.  Its float32 linear layers go to MKL, which on processors of another
maker reaches less than half of the rate of oneDNN, to which its convolutions go, and its bfloat16 ones
write the bias over the whole output first.  In diffusers: every Linear in SVD's transformers, and in the
attention of MidBlockTemporalDecoder, whose input is [N,L,C].
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, frozen, parts, rewrite_each
from svd_engine.networks.rewrites.fused_qkv import FusedSelfAttention
from svd_engine.networks.rewrites.single_token_cross_attention import SingleTokenCrossAttention

WITH_TOKENS = (TransformerSpatioTemporalModel, Attention, FusedSelfAttention)
WITHOUT = (TimestepEmbedding, SingleTokenCrossAttention)  # a row per frame or per video: nothing to gain


def apply(network: nn.Module) -> Report:
    paths = dict.fromkeys(path for kind in WITH_TOKENS for path in within(network, kind))
    for kind in WITHOUT:
        for path in within(network, kind):
            paths.pop(path, None)
    places = [(path, part) for path, part in parts(network, nn.Linear) if path in paths]
    return rewrite_each(places, lambda part: None, TokenConvolution, network)


def within(network: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Paths of everything inside parts of that kind."""
    return [
        f"{path}.{name}".removeprefix(".")
        for path, part in parts(network, kind)
        for name, _ in part.named_modules()
    ]


class TokenConvolution(nn.Module):
    """[N,L,C] -> [N,L,C'], the call of the Linear it replaces."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = frozen(layer.weight[:, :, None, None].contiguous(memory_format=torch.channels_last))
        self.bias = None if layer.bias is None else frozen(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, :, None].permute(0, 3, 1, 2)  # [N, C, L, 1]
        return F.conv2d(image, self.weight, self.bias).permute(0, 2, 3, 1)[:, :, 0]
