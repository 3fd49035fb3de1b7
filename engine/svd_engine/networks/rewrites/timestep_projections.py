"""The timestep projections of all resnets as one product, one row per video.

    e = silu(emb),   [p_1; p_2; ...; p_n] = [W_1; W_2; ...; W_n] e + [b_1; b_2; ...; b_n]

Every resnet projects the same vector, and emb is the same for each frame of a video, so B rows do for the
B*F that diffusers makes.  In diffusers: time_emb_proj of ResnetBlock2D and of TemporalResnetBlock, each
with an activation of its own, in every SpatioTemporalResBlock of the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.resnet import SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.networks.rewrites._forwards import VideoUNet, adopt, obstacle_to_adoption
from svd_engine.networks.rewrites._places import Report, linear, parts


def apply(network: nn.Module) -> Report:
    resnets = parts(network, SpatioTemporalResBlock)
    projecting = [(p, r) for p, r in resnets if r.spatial_res_block.time_emb_proj is not None]
    if not projecting:  # the VAE's resnets know no timestep, and the second time none is left
        return Report(0)
    reasons = tuple(
        f"{path}: {reason}" for path, resnet in resnets if (reason := obstacle(resnet)) is not None
    )
    reason = obstacle_to_adoption(network)
    if reason is not None:
        reasons = (f"the whole network: {reason}", *reasons)
    if reasons:
        return Report(0, reasons)  # the embedding reaches either all resnets or none
    adopt(network)
    assert isinstance(network, VideoUNet)
    layers = []
    for index, (_, resnet) in enumerate(projecting):
        layers += [resnet.spatial_res_block.time_emb_proj, resnet.temporal_res_block.time_emb_proj]
        resnet.spatial_res_block.time_emb_proj = resnet.temporal_res_block.time_emb_proj = None
        resnet.__class__ = ShiftedResBlock
        resnet.temporal_res_block.__class__ = ShiftedTemporalResnet
        resnet.shift = index
    network.timestep_projections = TimestepProjections(layers)
    return Report(len(layers))


def obstacle(resnet: SpatioTemporalResBlock) -> str | None:
    spatial, temporal = resnet.spatial_res_block, resnet.temporal_res_block
    if spatial.time_emb_proj is None or temporal.time_emb_proj is None:
        return "one of its resnets takes no timestep"
    if spatial.time_embedding_norm != "default" or spatial.skip_time_act:
        return "its timestep is more than a shift"
    if not all(isinstance(part.nonlinearity, nn.SiLU) for part in (spatial, temporal)):
        return "its activation is not SiLU"
    if spatial.upsample is not None or spatial.downsample is not None:
        return "it resamples"
    return None


class TimestepProjections(nn.Module):
    """emb [B,E] -> (spatial [B,C], temporal [B,C]) for each resnet, in the order of the network's modules."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        first = layers[0].weight
        weight = first.new_empty(sum(self.sizes), first.shape[1])
        bias = first.new_empty(sum(self.sizes))
        rows = zip(weight.split(self.sizes), bias.split(self.sizes), strict=True)
        for layer, (weight_rows, bias_rows) in zip(layers, rows, strict=True):
            weight_rows.copy_(layer.weight)
            bias_rows.copy_(layer.bias)
        self.projection = linear(weight, bias)

    def forward(self, emb: Tensor) -> list[tuple[Tensor, Tensor]]:
        shifts = self.projection(F.silu(emb)).split(self.sizes, 1)
        return list(zip(shifts[::2], shifts[1::2], strict=True))


class ShiftedResBlock(SpatioTemporalResBlock):  # type: ignore[misc]  # diffusers is untyped
    """Takes the call of the block it was, with all projections as `temb`; `shift` counts to its own."""

    shift: int

    def forward(
        self, hidden_states: Tensor, temb: Sequence[tuple[Tensor, Tensor]], image_only_indicator: Tensor
    ) -> Tensor:
        spatial, temporal = temb[self.shift]  # [B, C] each
        batch, frames = image_only_indicator.shape
        per_frame = spatial[:, None].expand(-1, frames, -1).flatten(0, 1)  # [B*F, C]
        x = self.spatial_res_block(hidden_states, per_frame[:, :, None, None])
        x = x.unflatten(0, (batch, frames)).transpose(1, 2)  # [B, C, F, h, w]
        y = self.temporal_res_block(x, temporal[:, :, None, None, None])
        y = self.time_mixer(x_spatial=x, x_temporal=y, image_only_indicator=image_only_indicator)
        return y.transpose(1, 2).flatten(0, 1)  # type: ignore[no-any-return]


class ShiftedTemporalResnet(TemporalResnetBlock):  # type: ignore[misc]  # diffusers is untyped
    """Takes the call of the resnet it was, with `temb` projected already, [B,C,1,1,1]."""

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(input_tensor))) + temb  # [B, C, F, h, w]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return h + (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))
