"""The spatio-temporal resnets' own forward, for the rewrites that change what passes through them.

The modules stay diffusers' and keep every weight; only their class changes.  Timesteps come as one
embedding per frame, as in diffusers, or as finished shifts per video; temporal convolutions are Conv3d
over [B,C,F,h,w] or take flat pixels, [B,C,F,h*w].  Activations work in place, and the sum is not divided
by an output scale of 1.  Same results, no identity of its own.
Source: forward of ResnetBlock2D, TemporalResnetBlock and SpatioTemporalResBlock.

Letters in shapes: B videos, F frames, h w latent pixels, C channels, E size of the timestep embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.resnet import AlphaBlender, ResnetBlock2D, SpatioTemporalResBlock, TemporalResnetBlock
from torch import Tensor, nn
from torch.nn import functional as F

# Spatial and temporal half of each resnet: [B,C] or, for all, [1,C]; of every frame [B,F,C] or [1,F,C]
Shifts = Sequence[tuple[Tensor, Tensor]]


def obstacle_to_adoption(resnet: SpatioTemporalResBlock) -> str | None:
    """Why a resnet cannot take the forward below."""
    if type(resnet) not in (SpatioTemporalResBlock, VideoResBlock):
        return f"{type(resnet).__name__} has a forward of its own"
    spatial, temporal = resnet.spatial_res_block, resnet.temporal_res_block
    if type(spatial) is not ResnetBlock2D or type(temporal) is not TemporalResnetBlock:
        return "its halves are not diffusers' ResnetBlock2D and TemporalResnetBlock"
    if spatial.upsample is not None or spatial.downsample is not None:
        return "it resamples"
    if spatial.time_embedding_norm != "default" or spatial.skip_time_act:
        return "its timestep is more than a shift"
    if not isinstance(spatial.nonlinearity, nn.SiLU) or not isinstance(temporal.nonlinearity, nn.SiLU):
        return "its activation is not SiLU"
    if (spatial.time_emb_proj is None) != (temporal.time_emb_proj is None):
        return "one of its halves takes no timestep"
    if spatial.output_scale_factor != 1:
        return f"its output is divided by {spatial.output_scale_factor}"
    return None


def adopt_resnet(resnet: SpatioTemporalResBlock) -> VideoResBlock:
    """Gives a resnet without obstacle the forward below, in place; the second time changes nothing."""
    if type(resnet) is not VideoResBlock:
        resnet.__class__ = VideoResBlock
        resnet.flat_pixels = False
        resnet.shift = None
    assert isinstance(resnet, VideoResBlock)
    return resnet


class VideoResBlock(SpatioTemporalResBlock):  # type: ignore[misc]  # diffusers is untyped
    """`flat_pixels`: its temporal convolutions take [B,C,F,h*w].  `shift`: its place in given shifts."""

    flat_pixels: bool
    shift: int | None

    def forward(
        self,
        hidden_states: Tensor,  # [B*F, C, h, w]
        temb: Tensor | Shifts | None = None,  # [B*F, E], shifts of all resnets, or nothing in the VAE
        image_only_indicator: Tensor | None = None,  # [B, F], read for its shape
    ) -> Tensor:
        assert image_only_indicator is not None  # it says how many frames a video has
        video = image_only_indicator.shape  # B, F
        spatial_shift, temporal_shift = self.shifts(temb, video)
        x = half(self.spatial_res_block, hidden_states, spatial_shift)
        return self.of_images(x, temporal_shift, image_only_indicator)

    def of_images(self, x: Tensor, shift: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        """The temporal half and the blend, [B*F,C,h,w] -> the same."""
        size, video = x.shape, image_only_indicator.shape
        x = x.flatten(2) if self.flat_pixels else x  # four dimensions where they do: compilers fuse more
        x = x.unflatten(0, video).transpose(1, 2)  # [B, C, F, h*w], or [B, C, F, h, w]
        mixed = self.over_frames(x, shift, image_only_indicator)
        return mixed.transpose(1, 2).reshape(size)

    def over_frames(self, x: Tensor, shift: Tensor | None, image_only_indicator: Tensor) -> Tensor:
        """The temporal half and the blend, [B,C,F,h,w] or with flat pixels [B,C,F,h*w] -> the same."""
        size = x.shape
        x = x.flatten(3) if self.flat_pixels else x
        y = half(self.temporal_res_block, x, shift)
        if isinstance(self.time_mixer, AlphaBlender):  # which takes five dimensions only
            x, y = (t.unsqueeze(4) if t.ndim == 4 else t for t in (x, y))
        mixed: Tensor = self.time_mixer(x_spatial=x, x_temporal=y, image_only_indicator=image_only_indicator)
        return mixed.reshape(size)

    def shifts(
        self, temb: Tensor | Shifts | None, video: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """What the timestep adds: spatial [B*F,C,1,1]; temporal [B,C,F,1], or [B,C,1,1] from given shifts of
        a video, with one dimension more where pixels are not flat.  Given shifts of one row serve all."""
        if temb is None:
            return None, None
        if self.shift is None:
            assert isinstance(temb, Tensor)
            activated = F.silu(temb)
            spatial = self.spatial_res_block.time_emb_proj(activated)  # [B*F, C]
            temporal = self.temporal_res_block.time_emb_proj(activated).unflatten(0, video).transpose(1, 2)
        else:
            spatial, temporal = temb[self.shift]
            if spatial.ndim == 3:  # of every frame
                spatial = spatial.expand(video[0], -1, -1).flatten(0, 1)
                temporal = temporal.transpose(1, 2)
            elif len(spatial) > 1:
                spatial = spatial[:, None].expand(-1, video[1], -1).flatten(0, 1)
            if temporal.ndim == 2:
                temporal = temporal[:, :, None]
        return spatial[:, :, None, None], temporal[..., None] if self.flat_pixels else temporal[
            ..., None, None
        ]


def half(resnet: ResnetBlock2D | TemporalResnetBlock, x: Tensor, shift: Tensor | None) -> Tensor:
    """norm, SiLU, conv, shift, norm, SiLU, conv around a shortcut: either half of a resnet."""
    h: Tensor = resnet.conv1(F.silu(resnet.norm1(x), inplace=True))
    if shift is not None:
        h += shift
    h = resnet.conv2(F.silu(resnet.norm2(h), inplace=True))
    shortcut: Tensor = x if resnet.conv_shortcut is None else resnet.conv_shortcut(x)
    return shortcut + h  # in the memory order of the shortcut
