"""softmax over one key is 1, so attention to a single token is that token's projection.

    attn2(x, c) = softmax(Q(x) K(c)^T / sqrt(d)) V(c) W_out + b_out
                = V(c) W_out + b_out                                   when c is one token
                = c (W_out W_v)^T + (W_out b_v + b_out)

for every query, whatever x is: norm2, to_q and to_k are dead, and to_v and to_out become one matrix.
SVD's context is one CLIP embedding, so this holds in all cross-attentions of its UNet: in diffusers,
attn2 of BasicTransformerBlock (context repeated per frame) and of TemporalBasicTransformerBlock (context
of the first frame repeated per pixel).  Both repeat one token per video, so here it is projected once
per video, [B,1,D] -> [B,1,C].

Precondition on the call: one context token.  It is checked there, because weights cannot tell.
"""

from __future__ import annotations

from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from svd_engine.errors import TensorMismatch
from svd_engine.networks.rewrites._attention import obstacle_to_plain
from svd_engine.networks.rewrites._forwards import adopt, obstacle_to_adoption
from svd_engine.networks.rewrites._places import Report, linear, parts


def apply(network: nn.Module) -> Report:
    done, left_alone = 0, []
    for path, transformer in parts(network, TransformerSpatioTemporalModel):
        blocks = (*transformer.transformer_blocks, *transformer.temporal_transformer_blocks)
        blocks = tuple(block for block in blocks if not isinstance(block.attn2, SingleTokenCrossAttention))
        reasons = [reason for block in blocks if (reason := obstacle(block)) is not None]
        reason = obstacle_to_adoption(network) or next(iter(reasons), None)
        if reason is not None:
            left_alone.append(f"{path}: {reason}")
            continue
        adopt(network)
        for block in blocks:
            block.norm2 = nn.Identity()
            block.attn2 = SingleTokenCrossAttention(block.attn2)
        transformer.context_per_video = True
        done += len(blocks)
    return Report(done, tuple(left_alone))


def obstacle(block: BasicTransformerBlock | TemporalBasicTransformerBlock) -> str | None:
    attention = block.attn2
    if attention is None:
        return "there is no cross-attention"
    if isinstance(block, BasicTransformerBlock) and block.norm_type != "layer_norm":
        return f"its norms are of type {block.norm_type}, not layer_norm"
    if not attention.is_cross_attention:
        return "its second attention is to the tokens themselves"
    if attention.group_norm is not None or attention.residual_connection:
        return "its cross-attention has group norm or a residual sum of its own"
    return obstacle_to_plain(attention)


class SingleTokenCrossAttention(nn.Module):
    """Takes the call of diffusers' Attention; the queries give only the number of rows.

    hidden_states [N,L,C] and encoder_hidden_states [M,1,D] -> [N,1,C], where N is a multiple of M and
    rows of one video stand together.  Raises TensorMismatch for a context of another length.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        value, out = attention.to_v, attention.to_out[0]
        weight = out.weight.double() @ value.weight.double()  # [C, D]
        bias = weight.new_zeros(len(weight)) if out.bias is None else out.bias.double()
        if value.bias is not None:
            bias = bias + out.weight.double() @ value.bias.double()
        dtype = out.weight.dtype
        self.to_out = linear(weight.to(dtype), bias.to(dtype))

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> Tensor:
        assert attention_mask is None  # SVD masks nothing
        rows, tokens = encoder_hidden_states.shape[:2]
        if tokens != 1:
            raise TensorMismatch(
                "cross-attention context",
                expected=f"one token, [{rows}, 1, {encoder_hidden_states.shape[2]}]",
                got=f"{tokens} tokens, {list(encoder_hidden_states.shape)}",
                remedy="Pass one image embedding per video, or switch single-token-cross-attention off.",
            )
        projected: Tensor = self.to_out(encoder_hidden_states)
        return projected.repeat_interleave(hidden_states.shape[0] // rows, 0)
