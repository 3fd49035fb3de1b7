"""The weight of a blend of spatial and temporal features, as a number.

Source: AlphaBlender of diffusers, for an image indicator that is zero everywhere.
"""

from __future__ import annotations

import torch
from diffusers.models.resnet import AlphaBlender


def spatial_share(blender: AlphaBlender) -> float:
    """a in a x_spatial + (1 - a) x_temporal, in [0, 1], computed in float64."""
    mix = blender.mix_factor.double()
    share = mix if blender.merge_strategy == "fixed" else torch.sigmoid(mix)
    return float(1 - share if blender.switch_spatial_to_temporal_mix else share)
