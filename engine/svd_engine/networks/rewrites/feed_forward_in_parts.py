"""The widest feed-forwards, half of the tokens at a time.

    f([x_1 ... x_N]) = [f(x_1 ... x_n) f(x_n+1 ... x_N)]      for f that sees one token at a time

Between the products of a feed-forward lie value and gate, each four times as wide as its tokens; where the
UNet has most tokens, nothing else takes as much memory.  Half of the tokens at a time take half of it.  The
normalisation before it goes with it: its own output would be copied to be sliced.
In diffusers: norm3 and ff of BasicTransformerBlock, norm_in, ff_in, norm3 and ff of
TemporalBasicTransformerBlock, in the transformers of fewest channels.
"""

from __future__ import annotations

from math import ceil

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from svd_engine.networks.rewrites._places import Report, parts, rewrite_each

PARTS = 2


def apply(network: nn.Module) -> Report:
    transformers = parts(network, TransformerSpatioTemporalModel)
    fewest = min((t.in_channels for _, t in transformers), default=0)
    places = [
        (f"{path}.{name}", block)
        for path, transformer in transformers
        if transformer.in_channels == fewest
        for name, block in transformer.named_modules()
        if isinstance(block, (BasicTransformerBlock, TemporalBasicTransformerBlock))
        and not isinstance(block.ff, NormedInParts)
    ]
    return rewrite_each(places, obstacle, rewrite, network)


def obstacle(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> str | None:
    if not all(isinstance(getattr(block, name), FeedForward) for _, name in pairs(block)):
        return "its feed-forward is not diffusers' FeedForward"
    if not all(isinstance(getattr(block, name), nn.LayerNorm) for name, _ in pairs(block)):
        return "its normalisations are not of single tokens"
    return None


def rewrite(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> None:
    for norm, feed_forward in pairs(block):
        setattr(block, feed_forward, NormedInParts(getattr(block, norm), getattr(block, feed_forward)))
        setattr(block, norm, nn.Identity())


def pairs(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> list[tuple[str, str]]:
    """Names of a normalisation and the feed-forward that reads it."""
    temporal = isinstance(block, TemporalBasicTransformerBlock)
    return [("norm_in", "ff_in"), ("norm3", "ff")] if temporal else [("norm3", "ff")]


class NormedInParts(nn.Module):
    """[..., C] -> the same, of tokens that are not normalised yet."""

    def __init__(self, norm: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm, self.feed_forward = norm, feed_forward

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        made = [self.feed_forward(self.norm(t)) for t in tokens.split(ceil(len(tokens) / PARTS))]
        return torch.cat(made).view_as(x)
