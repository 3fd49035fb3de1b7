"""The feed-forwards on a thousand tokens or so at a time: value and gate stay in a CPU's cache.

    f([x_1 ... x_N]) = [f(x_1 ... x_n) f(x_n+1 ... x_2n) ...]      for f that sees one token at a time

Value and gate are four times as wide as the tokens.  Of all tokens at once they leave the cache before they
are multiplied, and torch asks the system for that memory anew in each call, page after page.  Slices are
as many as leave value and gate NUMBERS each and a slice FEWEST tokens, for every slice reads all weights.
In SVD's 14 frames of 128x256, both halves of guidance, they have 1,792 and 896 tokens.
In diffusers: every FeedForward in SVD's transformers.
"""

from __future__ import annotations

from math import ceil

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from svd_engine.networks.rewrites._places import Report, parts, rewrite_each

NUMBERS = 2**21
FEWEST = 512


def apply(network: nn.Module) -> Report:
    sliced = {f"{path}.whole" for path, _ in parts(network, FeedForwardSlices)}
    places = [(path, part) for path, part in parts(network, FeedForward) if path not in sliced]
    return rewrite_each(places, lambda _: None, FeedForwardSlices, network)


class FeedForwardSlices(nn.Module):
    """[..., C] -> [..., C], the call of the FeedForward it holds."""

    def __init__(self, whole: FeedForward) -> None:
        super().__init__()
        self.whole = whole
        self.width = whole.net[2].in_features  # of value and gate, which its last layer reads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(1, -1, x.shape[-1])
        length = max(FEWEST, NUMBERS // self.width)
        slices = max(tokens.shape[1] // length, 1)
        made = [self.whole(t) for t in tokens.split(ceil(tokens.shape[1] / slices), dim=1)]
        return torch.cat(made, dim=1).view_as(x)
