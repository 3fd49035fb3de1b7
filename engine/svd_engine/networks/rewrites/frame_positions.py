"""The embedding of the frame number is a table: it depends on nothing but the number.

    table[n] = time_pos_embed(time_proj(n)),   n = 0, 1, 2, ...

In diffusers: time_proj and time_pos_embed of TransformerSpatioTemporalModel, which it runs for each frame
of each video in each call.  Its layers leave the weights with it (99 M of the 1,525 M
parameters of SVD's UNet).

Precondition on the call: no more frames than the table has rows.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn
from torch.func import functional_call

from svd_engine.errors import TensorMismatch
from svd_engine.networks.rewrites._forwards import adopt, obstacle_to_adoption
from svd_engine.networks.rewrites._places import Report, parts

ROWS = 128  # frames; SVD was trained on 14 and on 25


def apply(network: nn.Module) -> Report:
    transformers = parts(network, TransformerSpatioTemporalModel)
    places = [(p, t) for p, t in transformers if not isinstance(t.time_pos_embed, FramePositions)]
    reason = obstacle_to_adoption(network) if places else None
    if reason is not None:
        return Report(0, tuple(f"{path}: {reason}" for path, _ in places))
    for _, transformer in places:
        adopt(network)
        transformer.time_pos_embed = FramePositions(transformer)
        transformer.time_proj = nn.Identity()
    return Report(len(places))


class FramePositions(nn.Module):
    """Takes one row per frame, in order, and returns the first rows of the table: [F,...] -> [F,C]."""

    table: Tensor

    def __init__(self, transformer: TransformerSpatioTemporalModel) -> None:
        super().__init__()
        embed = transformer.time_pos_embed
        weight = embed.linear_1.weight
        wide = torch.promote_types(weight.dtype, torch.float32)  # float16 layers round once, in the table
        weights = {name: parameter.to(wide) for name, parameter in embed.named_parameters()}
        numbers = transformer.time_proj(torch.arange(ROWS, device=weight.device)).to(wide)
        table: Tensor = functional_call(embed, weights, (numbers,))
        self.register_buffer("table", table.to(weight.dtype))

    def forward(self, frames: Tensor) -> Tensor:
        if len(frames) > len(self.table):
            raise TensorMismatch(
                "frames of one video",
                expected=f"at most {len(self.table)}, the rows of the position table",
                got=str(len(frames)),
                remedy="Generate fewer frames, or switch frame-positions off.",
            )
        return self.table[: len(frames)]
