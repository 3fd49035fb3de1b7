"""Temporal transformer blocks that leave their tokens where the spatial ones put them.

Feed-forwards, norms and residual sums see one token at a time, so with P any permutation of tokens

    P^-1 block(P x) = block(x)      for every part of the block but its self-attention

and diffusers' copies [B*F, h*w, C] -> [B*h*w, F, C] and back (TemporalBasicTransformerBlock.forward) are
needed by the attention over frames alone.  That needs no copy either: a token's heads lie side by side, so
pixels and heads are one dimension of h*w*heads independent attentions over F frames, as views:

    [B*F, h*w, heads, d] = [B, F, h*w*heads, d] -> [B, h*w*heads, F, d]

and what comes back, [B, F, h*w*heads, d], is in the order of the tokens again.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._attention import obstacle_to_plain
from svd_engine.networks.rewrites._places import Report, parts, rewrite_each
from svd_engine.networks.rewrites.fused_qkv import FusedSelfAttention
from svd_engine.networks.rewrites.single_token_cross_attention import SingleTokenCrossAttention

MAX_ATTENTIONS = 65535  # independent attentions in one call: the limit of a CUDA grid's second dimension


def apply(network: nn.Module) -> Report:
    blocks = parts(network, TemporalBasicTransformerBlock)
    places = [(path, block) for path, block in blocks if not isinstance(block, FramesInPlace)]
    return rewrite_each(places, obstacle, rewrite, network)


def obstacle(block: TemporalBasicTransformerBlock) -> str | None:
    if not block.is_res:
        return "its feed-forward changes the number of channels"
    if block._chunk_size is not None:
        return "its feed-forward is chunked"
    if isinstance(block.attn1, FusedSelfAttention):
        return None
    return obstacle_to_plain(block.attn1)


def rewrite(block: TemporalBasicTransformerBlock) -> None:
    block.__class__ = FramesInPlace


class FramesInPlace(TemporalBasicTransformerBlock):  # type: ignore[misc]  # diffusers is untyped
    """Takes the call of the block it was: tokens [B*F, h*w, C] -> the same; one context per video,
    [B,L,D], or diffusers' repeated one, [B*h*w, L, D]."""

    def forward(
        self, hidden_states: Tensor, num_frames: int, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        x = hidden_states
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attend(self.norm1(x), num_frames)
        if self.attn2 is not None:
            x = x + self.attn2(self.norm2(x), self.context(encoder_hidden_states, num_frames, len(x)))
        out: Tensor = x + self.ff(self.norm3(x))
        return out

    def attend(self, x: Tensor, frames: int) -> Tensor:
        """Self-attention over the frames of each pixel, [B*F, h*w, C] -> the same."""
        attention = self.attn1
        if isinstance(attention, FusedSelfAttention):
            parts, to_out = attention.project(x), attention.to_out
        else:
            projections, to_out = (attention.to_q, attention.to_k, attention.to_v), attention.to_out[0]
            parts = tuple(project(x).unflatten(2, (attention.heads, -1)) for project in projections)
        # [B*F, h*w, heads, d] each -> [B, h*w*heads, F, d]
        q, k, v = (part.flatten(1, 2).unflatten(0, (-1, frames)).transpose(1, 2) for part in parts)
        attended = [
            F.scaled_dot_product_attention(*some)
            for some in zip(*(part.split(MAX_ATTENTIONS, 1) for part in (q, k, v)), strict=True)
        ]
        joined = attended[0] if len(attended) == 1 else torch.cat(attended, 1)
        out: Tensor = to_out(joined.transpose(1, 2).reshape(x.shape))
        return out

    def context(self, given: Tensor | None, frames: int, rows: int) -> Tensor:
        """[B,L,D] for attention to a single token; [B*F,L,D] for diffusers' own, whose rows must match."""
        assert given is not None  # cross-attention attends to something
        videos = rows // frames
        per_video = given if len(given) == videos else given[:: len(given) // videos]
        single = isinstance(self.attn2, SingleTokenCrossAttention)
        return per_video if single else per_video.repeat_interleave(frames, 0)
