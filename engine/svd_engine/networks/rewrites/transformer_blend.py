"""The blend after a temporal transformer as one sum, with its larger weight folded into the projection out.

    W (a s + (1 - a) t) = (m W) (a/m s + (1 - a)/m t),   m = max(a, 1 - a),   a = sigmoid(mix_factor)

so that one of the two factors is 1 and the other, in [0, 1], scales inside the sum: one pass over memory
where AlphaBlender of diffusers takes three, and no image indicator, which is zero for every frame of a
video.  The other factor cannot go into weights as it does after resnets: s and t are sums that LayerNorms
read on the way.  In diffusers: time_mixer and proj_out of TransformerSpatioTemporalModel.
"""

from __future__ import annotations

import torch
from diffusers.models.resnet import AlphaBlender
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import Tensor, nn

from svd_engine.networks.rewrites._blend import spatial_share
from svd_engine.networks.rewrites._places import Report, parts, rewrite_each, scale_


def apply(network: nn.Module) -> Report:
    transformers = parts(network, TransformerSpatioTemporalModel)
    places = [(path, t) for path, t in transformers if isinstance(t.time_mixer, AlphaBlender)]
    return rewrite_each(places, obstacle, rewrite, network)


def obstacle(transformer: TransformerSpatioTemporalModel) -> str | None:
    layers = len(transformer.temporal_transformer_blocks)
    return None if layers == 1 else f"{layers} layers share its blend, and only the last precedes proj_out"


def rewrite(transformer: TransformerSpatioTemporalModel) -> None:
    share = spatial_share(transformer.time_mixer)
    scale_(transformer.proj_out.weight, max(share, 1 - share))
    transformer.time_mixer = ScaledSum(share)


class ScaledSum(nn.Module):
    """Takes the call of AlphaBlender and returns its blend divided by the larger of the two shares."""

    def __init__(self, spatial_share: float) -> None:
        super().__init__()
        self.mostly_spatial = spatial_share >= 0.5
        larger = max(spatial_share, 1 - spatial_share)
        self.ratio = (1 - larger) / larger  # of the smaller share to the larger, in [0, 1]

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor) -> Tensor:  # noqa: ARG002
        large, small = (x_spatial, x_temporal) if self.mostly_spatial else (x_temporal, x_spatial)
        return torch.add(large, small, alpha=self.ratio)
