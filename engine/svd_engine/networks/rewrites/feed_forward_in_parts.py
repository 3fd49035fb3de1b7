"""The feed-forwards at the UNet's peak of memory, half of the tokens at a time.

    f([x_1 ... x_N]) = [f(x_1 ... x_n) f(x_n+1 ... x_N)]      for f that sees one token at a time

Between the products of a feed-forward lie value and gate, each four times as wide as its tokens; half of the
tokens at a time take half of it.  The normalisation before it goes with it: its own output would be copied to
be sliced.  That costs traffic, so it is done only where most is held at the same time.  With T one tensor of
the widest level, a spatial feed-forward there holds 11 T, a temporal one 12 T, for it has the spatial tokens
beside its own; and each skip that waits for the way up is one T more.  In parts are those of more than 12 T.
In diffusers: norm3 and ff of BasicTransformerBlock, norm_in, ff_in, norm3 and ff of
TemporalBasicTransformerBlock, in the first down block and the last up block.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from torch import Tensor, nn

from svd_engine.networks.rewrites._places import Report, rewrite_each

SPLIT = 2


def apply(network: nn.Module) -> Report:
    found = blocks_at_the_peak(network) if isinstance(network, UNetSpatioTemporalConditionModel) else ()
    places = [(path, block) for path, block in found if not isinstance(block.ff, NormedInParts)]
    return rewrite_each(places, obstacle, rewrite, network)


def blocks_at_the_peak(unet: Any) -> Iterator[tuple[str, Any]]:
    """Of the widest level: temporal blocks beside which a skip waits, and spatial ones beside two."""
    down, up = unet.down_blocks[0], unet.up_blocks[-1]
    last = len(unet.up_blocks) - 1
    waiting = [(f"down_blocks.0.attentions.{i}", t, i + 1) for i, t in enumerate(attentions(down))]
    behind = len(attentions(up)) - 1
    waiting += [(f"up_blocks.{last}.attentions.{i}", t, behind - i) for i, t in enumerate(attentions(up))]
    for path, transformer, skips in waiting:
        if skips >= 2:
            for i, block in enumerate(transformer.transformer_blocks):
                yield f"{path}.transformer_blocks.{i}", block
        if skips >= 1:
            for i, block in enumerate(transformer.temporal_transformer_blocks):
                yield f"{path}.temporal_transformer_blocks.{i}", block


def attentions(block: Any) -> Any:
    return getattr(block, "attentions", ())


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
        made = [self.feed_forward(self.norm(t)) for t in tokens.split(ceil(len(tokens) / SPLIT))]
        return torch.cat(made).view_as(x)
