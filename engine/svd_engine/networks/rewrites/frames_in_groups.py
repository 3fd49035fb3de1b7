"""The VAE decoder's widest place, a few frames at a time.

    f([x_1 ... x_F]) = [f(x_1 ... x_g) f(x_g+1 ... x_2g) ...]      for f that sees one frame at a time

The last upsampling doubles the pixels and keeps the channels, which the spatial half of the resnet after it
halves: between them lie the largest tensors of the decoder, several at once, and nothing there looks at
another frame.  Taken in groups, they are one group large, and what is kept of each group is half as wide.
In diffusers: the upsampler of the last but one UpBlockTemporalDecoder of TemporalDecoder, and
spatial_res_block of the first resnet of the last one.
"""

from __future__ import annotations

from math import ceil

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from torch import Tensor, nn

from svd_engine.networks.rewrites import frames_apart
from svd_engine.networks.rewrites._places import Report, rewrite_each
from svd_engine.networks.rewrites._resnets import adopt_resnet, half

MOST = 13  # frames of a group: 25 are 13 and 12, 14 are 7 and 7


def apply(network: nn.Module) -> Report:
    mine = (FramesInGroups, frames_apart.FramesApart)  # whose groups are single frames
    places = [("the whole network", network)] if isinstance(network, TemporalDecoder) else []
    return rewrite_each([p for p in places if not isinstance(p[1], mine)], obstacle, rewrite, network)


def obstacle(decoder: TemporalDecoder) -> str | None:
    if len(decoder.up_blocks) < 2 or not decoder.up_blocks[-2].upsamplers:
        return "nothing is upsampled before its last block"
    return frames_apart.obstacle(decoder)


def rewrite(decoder: TemporalDecoder) -> None:
    adopt_resnet(decoder.up_blocks[-1].resnets[0])
    decoder.__class__ = FramesInGroups


class FramesInGroups(TemporalDecoder):  # type: ignore[misc]  # diffusers is untyped
    def forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
        """[B*F,4,h,w] -> [B*F,3,H,W]; the indicator [B,F] says how many frames a video has."""
        x = self.mid_block(self.conv_in(sample), image_only_indicator=image_only_indicator)
        for block in self.up_blocks[:-2]:
            x = block(x, image_only_indicator=image_only_indicator)
        before, last = self.up_blocks[-2:]
        first, *others = last.resnets
        for resnet in before.resnets:
            x = resnet(x, image_only_indicator=image_only_indicator)

        groups = [self.widest(group) for group in x.split(size_of_group(len(x)))]
        x = groups[0] if len(groups) == 1 else torch.cat(groups)
        x = first.of_images(x, None, image_only_indicator)
        for resnet in others:
            x = resnet(x, image_only_indicator=image_only_indicator)
        for upsampler in last.upsamplers or ():
            x = upsampler(x)

        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))  # [B*F, 3, H, W]
        video = (len(x) // num_frames, num_frames)
        pixels: Tensor = self.time_conv_out(x.unflatten(0, video).transpose(1, 2))  # [B, 3, F, H, W]
        return pixels.transpose(1, 2).flatten(0, 1)

    def widest(self, x: Tensor) -> Tensor:
        """[N,C,h,w] -> [N,C/2,2h,2w], frame by frame."""
        for upsampler in self.up_blocks[-2].upsamplers:
            x = upsampler(x)
        return half(self.up_blocks[-1].resnets[0].spatial_res_block, x, None)


def size_of_group(frames: int) -> int:
    """At most MOST, in as few groups as that takes, of much the same size."""
    return ceil(frames / ceil(frames / MOST))
