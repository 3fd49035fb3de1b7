"""Value and gate of a feed-forward as two products instead of one and its two slices.

    [value; gate] = [W_v; W_g] x + b,   value * gelu(gate)  =  (W_v x + b_v) * gelu(W_g x + b_g)

A slice of the last dimension is free as a view but a copy where an operator needs dense memory, and it
keeps the whole product, 8 C numbers a token, alive until the end.  Here the gate is done and gone before
the value is made.  In diffusers: GEGLU, the first layer of every FeedForward in SVD's transformers.
"""

from __future__ import annotations

from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._places import Report, linear, parts, rewrite_each


def apply(network: nn.Module) -> Report:
    return rewrite_each(parts(network, GEGLU), lambda part: None, SplitGEGLU, network)


class SplitGEGLU(nn.Module):
    """[..., C] -> [..., 4 C]"""

    def __init__(self, geglu: GEGLU) -> None:
        super().__init__()
        weights = geglu.proj.weight.chunk(2)
        biases = (None, None) if geglu.proj.bias is None else geglu.proj.bias.chunk(2)
        value, gate = ((w, b if b is None else b.clone()) for w, b in zip(weights, biases, strict=True))
        self.value, self.gate = linear(value[0].clone(), value[1]), linear(gate[0].clone(), gate[1])

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate(x))
        return gate.mul_(self.value(x))
