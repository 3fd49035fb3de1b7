"""When diffusers' Attention is plain multi-head attention, and its parts as the rewrites need them."""

from __future__ import annotations

from math import isclose

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0


def obstacle_to_plain(attention: Attention) -> str | None:
    """Why softmax(Q K^T / sqrt(d)) V, projected out, is not all that `attention` computes on its tokens."""
    if not isinstance(attention, Attention):
        return f"{type(attention).__name__} is not diffusers' Attention"
    if type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        return f"its processor is {type(attention.processor).__name__}"
    for extra in ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj"):
        if getattr(attention, extra, None) is not None:
            return f"it has {extra}"
    if attention.inner_kv_dim != attention.inner_dim:
        return "keys and values have fewer heads than queries"
    if not isclose(attention.scale, (attention.inner_dim // attention.heads) ** -0.5):
        return f"its scores are scaled by {attention.scale}"
    if attention.rescale_output_factor != 1:
        return f"its output is divided by {attention.rescale_output_factor}"
    return None
