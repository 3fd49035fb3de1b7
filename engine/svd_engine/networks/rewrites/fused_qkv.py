"""Queries, keys and values of self-attention as one product.

    [Q; K; V] = [W_q; W_k; W_v] x + [b_q; b_k; b_v]

Tokens are read once and one wide product fills a machine better than three narrow ones.  The rows are
ordered head by head, (q, k, v) within a head, so that a head of any of the three is a strided view of the
product.  In diffusers: attn1 of BasicTransformerBlock and of TemporalBasicTransformerBlock, and the
Attention of MidBlockTemporalDecoder, which stands between group norm and a residual sum on [N,C,h,w].
"""

from __future__ import annotations

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._attention import obstacle_to_plain
from svd_engine.networks.rewrites._places import Report, linear, parts, rewrite_each


def apply(network: nn.Module) -> Report:
    blocks = (*parts(network, BasicTransformerBlock), *parts(network, TemporalBasicTransformerBlock))
    places = [(f"{path}.attn1", block.attn1) for path, block in blocks]
    for path, block in parts(network, MidBlockTemporalDecoder):
        places += [(f"{path}.attentions.{index}", part) for index, part in enumerate(block.attentions)]
    mine = (FusedSelfAttention, ImageAttention)
    places = [(path, attention) for path, attention in places if not isinstance(attention, mine)]
    return rewrite_each(places, obstacle, fuse, network)


def obstacle(attention: Attention) -> str | None:
    reason = obstacle_to_plain(attention)
    if reason is not None:
        return reason
    if attention.is_cross_attention:
        return "it attends to the context"
    if (attention.group_norm is None) == attention.residual_connection:
        return "it has group norm or a residual sum, and not both"
    return None


def fuse(attention: Attention) -> nn.Module:
    fused = FusedSelfAttention(attention)
    return fused if attention.group_norm is None else ImageAttention(attention.group_norm, fused)


class FusedSelfAttention(nn.Module):
    """Self-attention of tokens [N,L,C] -> [N,L,C]; takes the call of diffusers' Attention."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads = attention.heads
        three = (attention.to_q, attention.to_k, attention.to_v)
        bias = None if three[0].bias is None else self._by_head([part.bias for part in three])
        self.to_qkv = linear(self._by_head([part.weight for part in three]), bias)
        self.to_out = attention.to_out[0]

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: None = None, attention_mask: None = None
    ) -> Tensor:
        assert encoder_hidden_states is None  # self-attention, and SVD masks nothing
        assert attention_mask is None
        q, k, v = (part.transpose(1, 2) for part in self.project(hidden_states))  # [N, heads, L, d]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [N, L, heads, d]
        out: Tensor = self.to_out(attended.flatten(2))
        return out

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [N,L,C] -> q, k and v, [N,L,heads,d] each, views of one product."""
        q, k, v = self.to_qkv(x).unflatten(2, (self.heads, 3, -1)).unbind(3)
        return q, k, v

    def _by_head(self, three: list[Tensor]) -> Tensor:
        """q, k, v rows [heads*d, ...] each -> [heads*3*d, ...]."""
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in three], 1).flatten(0, 2)


class ImageAttention(nn.Module):
    """Each pixel attends to its frame: [N,C,h,w] -> [N,C,h,w], group norm before, a sum after."""

    def __init__(self, group_norm: nn.GroupNorm, attention: FusedSelfAttention) -> None:
        super().__init__()
        self.group_norm, self.attention = group_norm, attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, h*w, C]
        attended: Tensor = self.attention(tokens)
        out: Tensor = x + attended.transpose(1, 2).unflatten(2, x.shape[2:])
        return out
