"""The UNet's and its transformers' own forwards, for the rewrites that change what passes between modules.

The modules stay diffusers' and keep every weight; only their class changes, to one with a forward in
which the encoder's tokens travel once per video (diffusers repeats them per frame, and again per pixel),
a timestep may travel as finished projections, and conditioning may differ from frame to frame (which
diffusers does not know).  Same calls, same results, no identity of its own.
Source: UNetSpatioTemporalConditionModel.forward, those of its blocks, and
TransformerSpatioTemporalModel.forward.

Letters in shapes: B videos, F frames, h w latent pixels, C channels, L context tokens, D their size, E size
of the timestep embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnDownBlockSpatioTemporal,
    CrossAttnUpBlockSpatioTemporal,
    DownBlockSpatioTemporal,
    UpBlockSpatioTemporal,
)
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput
from torch import Tensor, nn

BLOCKS = (  # whose modules `UNetPath` calls one by one
    CrossAttnDownBlockSpatioTemporal,
    CrossAttnUpBlockSpatioTemporal,
    DownBlockSpatioTemporal,
    UpBlockSpatioTemporal,
)


def obstacle_to_adoption(network: Any) -> str | None:
    """Why a module cannot take the forwards below: it is not diffusers' UNet, or has its own forward."""
    known = (UNetSpatioTemporalConditionModel, VideoUNet)
    if type(network) not in known:
        return f"{type(network).__name__} is not diffusers' UNetSpatioTemporalConditionModel"
    others = [block for block in (*network.down_blocks, *network.up_blocks) if type(block) not in BLOCKS]
    others += [
        part
        for part in network.modules()
        if isinstance(part, TransformerSpatioTemporalModel) and not _known(part)
    ]
    return f"{type(others[0]).__name__} has a forward of its own" if others else None


def _known(transformer: TransformerSpatioTemporalModel) -> bool:
    return type(transformer) is TransformerSpatioTemporalModel or isinstance(transformer, VideoTransformer)


def adopt(network: nn.Module) -> None:
    """Gives a UNet without obstacle the forwards below, in place; the second time changes nothing."""
    if type(network) is VideoUNet:
        return
    for part in network.modules():
        if isinstance(part, TransformerSpatioTemporalModel):
            part.__class__ = VideoTransformer
            part.context_per_video = False
    network.__class__ = VideoUNet
    network.register_module("timestep_projections", None)


def tell_per_frame(network: nn.Module, widths: Sequence[int]) -> None:
    """Has a UNet without obstacle take ids [B,F,n] whose embeddings have these n widths, in place."""
    adopt(network)
    network.add_time_proj = FieldSinusoids(widths)


class FieldSinusoids(nn.Module):
    """Numbers [N,n] -> the sinusoids of each beside each other, [N, sum of the n widths]."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.columns = nn.ModuleList(Timesteps(width, True, downscale_freq_shift=0) for width in widths)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([embed(ids[:, n]) for n, embed in enumerate(self.columns)], dim=1)


class VideoUNet(UNetSpatioTemporalConditionModel):  # type: ignore[misc]  # diffusers is untyped
    """`timestep_projections`, when set, turns the embedding into what resnets take as `temb`."""

    timestep_projections: nn.Module | None
    one_row_for_all = True  # of the time ids, where diffusers wants a row per video

    def forward(
        self,
        sample: Tensor,  # [B, F, channels, h, w]
        timestep: Tensor | float,  # one number for all, or [B]
        encoder_hidden_states: Tensor,  # [B, L, D]
        added_time_ids: Tensor,  # [B, n], or [1, n] for all; after `tell_per_frame` [B, F, n] or [1, F, n]
        return_dict: bool = True,
    ) -> Any:
        path = UNetPath(self, sample, timestep, encoder_hidden_states, added_time_ids)
        x, skips = path.down()
        x = path.end(path.up(path.middle(x), skips))
        return UNetSpatioTemporalConditionOutput(sample=x) if return_dict else (x,)

    def temb(self, sample: Tensor, timestep: Tensor | float, added_time_ids: Tensor) -> Any:
        """What resnets take: the embedding of each frame [B*F,E], or what `timestep_projections` make."""
        batch, frames = sample.shape[:2]
        embedding = self.embed(sample, timestep, added_time_ids)
        if self.timestep_projections is not None:
            return self.timestep_projections(embedding)
        if embedding.ndim == 3:
            return embedding.expand(batch, -1, -1).flatten(0, 1)
        return embedding.expand(batch, -1).repeat_interleave(frames, 0)

    def embed(self, sample: Tensor, timestep: Tensor | float, added_time_ids: Tensor) -> Tensor:
        """Timestep and micro-conditioning, [B,E], or where the ids differ from frame to frame [B,F,E].

        The sinusoids are float32 whatever the network is.  A timestep and ids that are one for all give one
        row for all, [1,E] or [1,F,E].
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # [B] or [1]
        t = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # [B, E] or [1, E]
        rows = added_time_ids.flatten(0, -2)
        told = (
            self.add_time_proj(rows)
            if isinstance(self.add_time_proj, FieldSinusoids)
            else self.add_time_proj(rows.flatten()).reshape(len(rows), -1)
        )
        ids: Tensor = self.add_embedding(told.to(sample.dtype))
        if added_time_ids.ndim == 3:
            t, ids = t[:, None], ids.unflatten(0, added_time_ids.shape[:2])
        embedding: Tensor = t + ids
        return embedding


class UNetPath:
    """One evaluation of a `VideoUNet`, a module at a time: one down leaves a skip, one up takes the last.

    A module is a resnet with the attention and, of an upward block's last, the upsampler behind it; or a
    downsampler.
    """

    def __init__(
        self,
        unet: Any,  # a VideoUNet
        sample: Tensor,  # [B, F, channels, h, w]
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
    ) -> None:
        batch, frames = sample.shape[:2]
        self.temb = unet.temb(sample, timestep, added_time_ids)
        self.unet, self.sample, self.context = unet, sample, encoder_hidden_states
        self.indicator = sample.new_zeros(batch, frames)

    def down(self, modules: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """The sample through the downward path, or its first `modules`, and all skips on the way."""
        x = self.unet.conv_in(self.sample.flatten(0, 1))  # [B*F, C, h, w] from here on
        skips = [x]
        for module in islice(self._down_modules(), modules):
            x = module(x)
            skips.append(x)
        return x, skips

    def middle(self, x: Tensor) -> Tensor:
        out: Tensor = self.unet.mid_block(
            hidden_states=x,
            temb=self.temb,
            encoder_hidden_states=self.context,
            image_only_indicator=self.indicator,
        )
        return out

    def up(self, x: Tensor, skips: list[Tensor], first: int = 0, end: int | None = None) -> Tensor:
        """`x` through the upward path, or its modules from `first` to before `end`; uses up `skips`."""
        places = [(block, index) for block in self.unet.up_blocks for index in range(len(block.resnets))]
        for block, index in places[first:end]:
            x = self._resnet(block, index, torch.cat([x, skips.pop()], dim=1))
            if index + 1 == len(block.resnets):
                x = self._upsampled(block, x, skips)
        return x

    def end(self, x: Tensor) -> Tensor:
        """The UNet's output [B, F, channels, h, w]."""
        unet = self.unet
        out: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        video: Tensor = out.unflatten(0, self.sample.shape[:2])
        return video

    def _down_modules(self) -> Iterator[Callable[[Tensor], Tensor]]:
        for block in self.unet.down_blocks:
            for index in range(len(block.resnets)):
                yield partial(self._resnet, block, index)
            yield from block.downsamplers or ()

    def _resnet(self, block: Any, index: int, x: Tensor) -> Tensor:
        out: Tensor = block.resnets[index](x, self.temb, image_only_indicator=self.indicator)
        if attends(block):
            (out,) = block.attentions[index](
                out,
                encoder_hidden_states=self.context,
                image_only_indicator=self.indicator,
                return_dict=False,
            )
        return out

    def _upsampled(self, block: Any, x: Tensor, skips: list[Tensor]) -> Tensor:
        size = tuple(skips[-1].shape[2:]) if skips and odd(self.sample, self.unet.num_upsamplers) else None
        for upsampler in block.upsamplers or ():
            x = upsampler(x, size)
        return x


class VideoTransformer(TransformerSpatioTemporalModel):  # type: ignore[misc]  # diffusers is untyped
    """`context_per_video`: the blocks' cross-attention takes the tokens as they come, [B,L,D]."""

    context_per_video: bool

    def forward(
        self,
        hidden_states: Tensor,  # [B*F, C, h, w]
        encoder_hidden_states: Tensor,  # [B, L, D]
        image_only_indicator: Tensor,  # [B, F], read for its shape
        return_dict: bool = True,
    ) -> Any:
        assert not return_dict  # diffusers' blocks never ask for it
        (batch, frames), (height, width) = image_only_indicator.shape, hidden_states.shape[2:]
        spatial_context = temporal_context = encoder_hidden_states
        if not self.context_per_video:
            spatial_context = encoder_hidden_states.repeat_interleave(frames, 0)
            temporal_context = encoder_hidden_states.repeat_interleave(height * width, 0)

        x = self.proj_in(self.norm(hidden_states).flatten(2).transpose(1, 2))  # [B*F, h*w, C]
        numbers = torch.arange(frames, device=x.device)
        positions = self.time_pos_embed(self.time_proj(numbers).to(x.dtype))  # [F, C]
        positions = positions.repeat(batch, 1)[:, None]  # [B*F, 1, C]
        for spatial, temporal in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            x = spatial(x, encoder_hidden_states=spatial_context)
            mixed = temporal(x + positions, num_frames=frames, encoder_hidden_states=temporal_context)
            x = self.time_mixer(x_spatial=x, x_temporal=mixed, image_only_indicator=image_only_indicator)
        x = self.proj_out(x).transpose(1, 2).unflatten(2, (height, width))
        return (hidden_states + x,)


def attends(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def odd(sample: Tensor, upsamplers: int) -> bool:
    """Whether h or w is no multiple of the UNet's downsampling, so that upsampling is told its size."""
    return any(side % 2**upsamplers for side in sample.shape[-2:])
