"""The blend after a temporal resnet is a factor on its branch, and a factor goes into weights.

    a x + (1 - a) (x + conv2(h)) = x + (1 - a) conv2(h) = x + conv2'(h),   conv2' = (1 - a) conv2

where a is the weight of the spatial path: sigmoid(mix_factor), or 1 - sigmoid(mix_factor) in the VAE
decoder, whose blends are switched (switch_spatial_to_temporal_mix).  In diffusers: time_mixer and
temporal_res_block.conv2 of SpatioTemporalResBlock.  With the blend go two products and a sum over the
whole tensor, mix_factor, and the image indicator, which is zero for every frame of a video.
"""

from __future__ import annotations

from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock
from torch import Tensor, nn

from svd_engine.networks.rewrites._blend import spatial_share
from svd_engine.networks.rewrites._places import Report, parts, rewrite_each, scale_


def apply(network: nn.Module) -> Report:
    places = [
        (p, r) for p, r in parts(network, SpatioTemporalResBlock) if isinstance(r.time_mixer, AlphaBlender)
    ]
    return rewrite_each(places, obstacle, rewrite, network)


def obstacle(resnet: SpatioTemporalResBlock) -> str | None:
    if resnet.temporal_res_block.conv_shortcut is not None:
        return "its temporal resnet changes the number of channels, so x + h is not what it returns"
    return None


def rewrite(resnet: SpatioTemporalResBlock) -> None:
    temporal_share = 1 - spatial_share(resnet.time_mixer)
    scale_(resnet.temporal_res_block.conv2.weight, temporal_share)
    scale_(resnet.temporal_res_block.conv2.bias, temporal_share)
    resnet.time_mixer = BlendedAlready()


class BlendedAlready(nn.Module):
    """Takes the call of AlphaBlender and passes the temporal path on."""

    def forward(self, x_spatial: Tensor, x_temporal: Tensor, image_only_indicator: Tensor) -> Tensor:  # noqa: ARG002
        return x_temporal
