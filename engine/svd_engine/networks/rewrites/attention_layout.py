"""Tokens in the order in which attention reads them: the sequence outermost, turned between the two kinds.

Everything in a transformer block but its self-attention sees one token at a time, so with P any permutation
of tokens

    P^-1 block(P x) = block(x)      for every part of the block but its self-attention

and tokens may lie in the order that suits the attention.  A fused kernel takes independent attentions at one
stride, [attentions, S, d].  With the sequence outermost, [S, M, heads, d], M and heads are one dimension of
that stride as they lie, and q, k, v and what comes back need no copy:

    spatial    S = h*w, M = B*F        temporal    S = F, M = B*h*w

diffusers has the sequence inside, [M, S, heads, d], where each attention needs a copy before and one after.
The turn from one order to the other goes with the normalisation that reads the tokens anyway; the projection
out is a 1x1 convolution of images, and the sum with them goes with it.
In diffusers: TransformerSpatioTemporalModel.forward and the forwards of its two kinds of blocks.

Letters in shapes: as in `_forwards`, and S the sequence, O the other of F and h*w.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites import frames_in_place
from svd_engine.networks.rewrites._attention import obstacle_to_plain
from svd_engine.networks.rewrites._forwards import VideoTransformer
from svd_engine.networks.rewrites._places import Report, parts, pointwise, rewrite_each
from svd_engine.networks.rewrites.feed_forward_in_parts import fed
from svd_engine.networks.rewrites.fused_qkv import FusedSelfAttention
from svd_engine.networks.rewrites.transformer_blend import ScaledSum


def apply(network: nn.Module) -> Report:
    transformers = parts(network, TransformerSpatioTemporalModel)
    places = [(path, t) for path, t in transformers if not isinstance(t, SequenceOutermost)]
    return rewrite_each(places, obstacle, rewrite, network)


def obstacle(transformer: TransformerSpatioTemporalModel) -> str | None:
    if not isinstance(transformer, VideoTransformer) or not transformer.context_per_video:
        return "its cross-attention is not to a single token"
    if not isinstance(transformer.time_mixer, ScaledSum):
        return "its blend is not one sum"
    if not isinstance(transformer.proj_out, nn.Linear):
        return "its last layer is not linear"
    reasons = [obstacle_in_spatial(block) for block in transformer.transformer_blocks]
    reasons += [frames_in_place.obstacle(block) for block in transformer.temporal_transformer_blocks]
    return next(filter(None, reasons), None)


def obstacle_in_spatial(block: BasicTransformerBlock) -> str | None:
    if block.pos_embed is not None:
        return "it adds positions of its own"
    if block._chunk_size is not None:
        return "its feed-forward is chunked"
    if isinstance(block.attn1, FusedSelfAttention):
        return None
    return obstacle_to_plain(block.attn1)


def rewrite(transformer: VideoTransformer) -> None:
    transformer.__class__ = SequenceOutermost
    transformer.proj_out = pointwise(transformer.proj_out)  # the sum after it goes with it


class SequenceOutermost(VideoTransformer):
    """Takes the call of the transformer it was; its projection out is a convolution of images."""

    def forward(
        self,
        hidden_states: Tensor,  # [B*F, C, h, w]
        encoder_hidden_states: Tensor,  # [B, 1, D]
        image_only_indicator: Tensor,  # [B, F], read for its shape
        return_dict: bool = True,
    ) -> Any:
        assert not return_dict  # diffusers' blocks never ask for it
        batch, frames = image_only_indicator.shape
        numbers = torch.arange(frames, device=hidden_states.device)
        positions = self.time_pos_embed(self.time_proj(numbers).to(hidden_states.dtype))[:, None, None]

        x = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))  # [B*F, h*w, C]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            spatial_c, temporal_c = (b.attn2.to_out(encoder_hidden_states)[None] for b in (spatial, temporal))
            x = without_c(spatial, x.transpose(0, 1), spatial_c)  # [h*w, B*F, C]
            mixed = turned(x, batch) + of_tokens(positions + spatial_c, len(x))  # [F, B*h*w, C]
            mixed = mixed + fed(temporal.norm_in, temporal.ff_in, mixed, batch)
            mixed = without_c(temporal, mixed, temporal_c) + of_tokens(temporal_c, len(x))
            x = x + of_tokens(spatial_c, frames)
            x = self.time_mixer(  # [B*F, h*w, C]
                x_spatial=x.transpose(0, 1),
                x_temporal=by_image(mixed, batch),
                image_only_indicator=image_only_indicator,
            )
        x = self.proj_out(x.transpose(1, 2).reshape(hidden_states.shape))
        return (hidden_states + x,)


def turned(x: Tensor, batch: int) -> Tensor:
    """From one sequence outermost to the other: [S, B*O, C] -> [O, B*S, C]."""
    if batch == 1:
        return x.transpose(0, 1)
    return x.unflatten(1, (batch, -1)).transpose(0, 2).flatten(1, 2)  # type: ignore[no-any-return]


def by_image(x: Tensor, batch: int) -> Tensor:
    """[F, B*h*w, C] -> [B*F, h*w, C]"""
    return x if batch == 1 else x.unflatten(1, (batch, -1)).transpose(0, 1).flatten(0, 1)


def without_c(block: BasicTransformerBlock | TemporalBasicTransformerBlock, x: Tensor, c: Tensor) -> Tensor:
    """What a block makes of tokens [S, B*O, C], less what its cross-attention adds, c [1,B,1,C].

    c is in the sum that the feed-forward reads, and is left to whatever reads the result: neither sum is
    written then.
    """
    x = x + attend(block.attn1, block.norm1(x))
    batch = c.shape[1]
    return x + fed(block.norm3, block.ff, x + of_tokens(c, x.shape[1] // batch), batch)


def of_tokens(per_video: Tensor, others: int) -> Tensor:
    """[S,B,1,C] -> [S, B*O, C], or for one video [S,1,C], which is the same to a sum."""
    if per_video.shape[1] == 1:
        return per_video[:, 0]
    return per_video.expand(-1, -1, others, -1).flatten(1, 2)


def attend(attention: Attention | FusedSelfAttention, x: Tensor) -> Tensor:
    """Self-attention over the outermost dimension, [S,M,C] -> the same."""
    if isinstance(attention, FusedSelfAttention):
        three, to_out = attention.project(x), attention.to_out
    else:
        projections, to_out = (attention.to_q, attention.to_k, attention.to_v), attention.to_out[0]
        three = tuple(project(x).unflatten(2, (attention.heads, -1)) for project in projections)
    q, k, v = (part.permute(1, 2, 0, 3) for part in three)  # [S, M, heads, d] -> [M, heads, S, d]
    attended = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)  # [S, M, heads, d]
    out: Tensor = to_out(attended.flatten(2))
    return out
