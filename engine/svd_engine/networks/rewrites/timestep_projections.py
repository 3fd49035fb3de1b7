"""The timestep projections of all resnets as one product, one row per video (per frame in SV3D_p).

    e = silu(emb),   [p_1; p_2; ...; p_n] = [W_1; W_2; ...; W_n] e + [b_1; b_2; ...; b_n]

Every resnet projects the same vector, and emb is the same for each frame of a video, so B rows do for the
B*F that diffusers makes.  In diffusers: time_emb_proj of ResnetBlock2D and of TemporalResnetBlock, each
after an activation of its own, in every SpatioTemporalResBlock of the UNet.
"""

from __future__ import annotations

from diffusers.models.resnet import SpatioTemporalResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._forwards import VideoUNet, adopt, obstacle_to_adoption
from svd_engine.networks.rewrites._places import Report, linear, parts
from svd_engine.networks.rewrites._resnets import Shifts, adopt_resnet
from svd_engine.networks.rewrites._resnets import obstacle_to_adoption as obstacle_to_resnet


def apply(network: nn.Module) -> Report:
    """All resnets or none: one embedding reaches them all."""
    resnets = parts(network, SpatioTemporalResBlock)
    if not any(resnet.spatial_res_block.time_emb_proj is not None for _, resnet in resnets):
        return Report(0)  # the VAE's resnets know no timestep, and the second time none is left
    obstacles = ((path, obstacle_to_resnet(resnet)) for path, resnet in resnets)
    reasons = [f"{path}: {reason}" for path, reason in obstacles if reason is not None]
    reason = obstacle_to_adoption(network)
    if reason is not None:
        reasons.append(f"the whole network: {reason}")
    if reasons:
        return Report(0, tuple(reasons))
    adopt(network)
    assert isinstance(network, VideoUNet)
    layers = []
    for index, (_, resnet) in enumerate(resnets):
        adopt_resnet(resnet).shift = index
        for half in (resnet.spatial_res_block, resnet.temporal_res_block):
            layers.append(half.time_emb_proj)
            half.time_emb_proj = None
    places = len(layers)
    network.timestep_projections = TimestepProjections(layers)
    return Report(places)


class TimestepProjections(nn.Module):
    """emb [B,E] -> (spatial [B,C], temporal [B,C]) for each resnet, in the order of the network's modules.

    Of an embedding for each frame, [B,F,E] -> [B,F,C] each.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Empties `layers`, so that each can be freed when its rows are copied."""
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        first = layers[0].weight
        weight = first.new_empty(sum(self.sizes), first.shape[1])
        bias = first.new_empty(sum(self.sizes))
        for weight_rows, bias_rows in zip(weight.split(self.sizes), bias.split(self.sizes), strict=True):
            layer = layers.pop(0)
            weight_rows.copy_(layer.weight)
            bias_rows.copy_(layer.bias)
        self.projection = linear(weight, bias)

    def forward(self, emb: Tensor) -> Shifts:
        shifts = self.projection(F.silu(emb)).split(self.sizes, -1)
        return tuple(zip(shifts[::2], shifts[1::2], strict=True))
