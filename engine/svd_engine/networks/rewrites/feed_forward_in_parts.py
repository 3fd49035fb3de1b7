"""The feed-forwards at the UNet's peak of memory, half of the tokens at a time.

    f([x_1 ... x_N]) = [f(x_1 ... x_n) f(x_n+1 ... x_N)]      for f that sees one token at a time

Between the products of a feed-forward lie value and gate, each four times as wide as its tokens; half of the
tokens at a time take half of it.  The normalisation before it goes with it: its own output would be copied to
be sliced.  That costs traffic, so it is done only where most is held at the same time.  With T one tensor of
the widest level, a spatial feed-forward there holds 11 T, a temporal one 12 T, for it has the spatial tokens
beside its own; and each skip that waits for the way up is one T more.  In parts are those of 14 T, and all of
that level where one video is alone, as one half of guidance is: that form is there for little memory, and its
compiled graphs hold 2 T more than these sums.
In diffusers: norm3 and ff of BasicTransformerBlock, norm_in, ff_in, norm3 and ff of
TemporalBasicTransformerBlock, in the first down block and the last up block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from torch import Tensor, nn

from svd_engine.networks.rewrites._places import Report, rewrite_each

SPLIT = 2
PEAK_SKIPS = 2  # that wait beside the temporal feed-forwards of 14 T


def apply(network: nn.Module) -> Report:
    if not isinstance(network, UNetSpatioTemporalConditionModel):
        return Report(0)
    reports = []
    for at_peak in (True, False):
        places = [(path, block) for path, block, peak in blocks_of_widest_level(network) if peak == at_peak]
        places = [place for place in places if not isinstance(place[1].ff, NormedInParts)]
        reports.append(rewrite_each(places, obstacle, partial(rewrite, at_peak=at_peak), network))
    return Report(
        sum(report.places for report in reports), tuple(line for r in reports for line in r.left_alone)
    )


def blocks_of_widest_level(unet: Any) -> Iterator[tuple[str, Any, bool]]:
    """Path, block, and whether the peak of memory is there however many videos there are."""
    down, up = unet.down_blocks[0], unet.up_blocks[-1]
    last = len(unet.up_blocks) - 1
    waiting = [(f"down_blocks.0.attentions.{i}", t, i + 1) for i, t in enumerate(attentions(down))]
    behind = len(attentions(up)) - 1
    waiting += [(f"up_blocks.{last}.attentions.{i}", t, behind - i) for i, t in enumerate(attentions(up))]
    for path, transformer, skips in waiting:
        for i, block in enumerate(transformer.transformer_blocks):
            yield f"{path}.transformer_blocks.{i}", block, False
        for i, block in enumerate(transformer.temporal_transformer_blocks):
            yield f"{path}.temporal_transformer_blocks.{i}", block, skips >= PEAK_SKIPS


def attentions(block: Any) -> Any:
    return getattr(block, "attentions", ())


def obstacle(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> str | None:
    if not all(isinstance(getattr(block, name), FeedForward) for _, name in pairs(block)):
        return "its feed-forward is not diffusers' FeedForward"
    if not all(isinstance(getattr(block, name), nn.LayerNorm) for name, _ in pairs(block)):
        return "its normalisations are not of single tokens"
    return None


def rewrite(block: BasicTransformerBlock | TemporalBasicTransformerBlock, at_peak: bool) -> None:
    for norm, feed_forward in pairs(block):
        whole = getattr(block, norm), getattr(block, feed_forward)
        setattr(block, feed_forward, NormedInParts(*whole, at_peak))
        setattr(block, norm, nn.Identity())


def pairs(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> list[tuple[str, str]]:
    """Names of a normalisation and the feed-forward that reads it."""
    temporal = isinstance(block, TemporalBasicTransformerBlock)
    return [("norm_in", "ff_in"), ("norm3", "ff")] if temporal else [("norm3", "ff")]


class NormedInParts(nn.Module):
    """[..., C] -> the same, of tokens of so many videos that are not normalised yet.

    at_peak: in parts always, else where one video is alone.
    """

    def __init__(self, norm: nn.Module, feed_forward: nn.Module, at_peak: bool) -> None:
        super().__init__()
        self.norm, self.feed_forward, self.at_peak = norm, feed_forward, at_peak

    def forward(self, x: Tensor, videos: int = 1) -> Tensor:
        if videos > 1 and not self.at_peak:
            return self.feed_forward(self.norm(x))  # type: ignore[no-any-return]
        tokens = x.flatten(0, -2)
        made = [self.feed_forward(self.norm(t)) for t in tokens.split(ceil(len(tokens) / SPLIT))]
        return torch.cat(made).view_as(x)


def fed(norm: nn.Module, feed_forward: nn.Module, x: Tensor, videos: int) -> Tensor:
    """What a feed-forward makes of the tokens that its normalisation reads, [..., C] -> the same."""
    if isinstance(feed_forward, NormedInParts):  # which has the normalisation inside
        return feed_forward(x, videos)  # type: ignore[no-any-return]
    return feed_forward(norm(x))  # type: ignore[no-any-return]
