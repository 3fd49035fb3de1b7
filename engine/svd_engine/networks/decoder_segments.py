"""The segments of a streamed decoder as torch modules: `spec.streaming` says which there are.

They share the weights of one TemporalDecoder, with or without exact rewrites.  Statistics, and what is
normalised by them, are float32.

Letters in shapes: n frames of a slice, F frames of the video, C channels, G groups, h w their pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.errors import SettingsError
from svd_engine.networks.streamed_decoder import PerFrame, layers_of, obstacle, through, valid_by_channel
from svd_engine.spec.streaming import FRONT, GROUPS, HEAD, STREAMED_BLOCKS
from svd_engine.spec.tensors import NetworkSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder

ATTENDED = 2  # frames at a time of an attention whose scores may be written out: 9,216 x 9,216 at 576x1024
FrameMoments = tuple[Tensor, Tensor]  # mean and variance [n,G] of frames, or [G] of a video, float32


def decoder_segment(vae: AutoencoderKLTemporalDecoder, spec: NetworkSpec) -> Segment:
    """The module of a row of the table.  Raises SettingsError for layers other than diffusers'."""
    reason = obstacle(vae.decoder)
    if reason is not None:
        raise SettingsError(
            "streamed decoder",
            expected="a decoder of diffusers' layers to stream",
            got=reason,
            remedy="Export the bundle without a streamed decoder.",
        )
    number = spec.segment
    assert number is not None
    last = FRONT + 2 * len(streamed_resnets(vae.decoder)) + 1
    kinds: dict[int, type[Segment]] = {HEAD: Head, FRONT: Front, last: Finish}
    kind = kinds.get(number, (MomentsOfResnet, Layer)[number % 2])
    return kind(vae.decoder, (number - FRONT - 1) // 2, spec)


def streamed_resnets(decoder: TemporalDecoder) -> list[SpatioTemporalResBlock]:
    return [resnet for block in decoder.up_blocks[-STREAMED_BLOCKS:] for resnet in block.resnets]


class Segment(nn.Module):
    """layer: number of its resnet among the streamed ones."""

    decoder: TemporalDecoder

    def __init__(self, decoder: TemporalDecoder, layer: int, spec: NetworkSpec) -> None:
        super().__init__()
        self.decoder, self.layer = decoder, layer
        self.left = getattr(torch, spec.outputs[0].dtype)  # type of what it leaves

    @property
    def dtype(self) -> torch.dtype:
        """That it computes in."""
        found: torch.dtype = next(self.decoder.parameters()).dtype
        return found

    def layers(self) -> tuple[list[tuple[list[PerFrame], SpatioTemporalResBlock]], list[PerFrame]]:
        """Those that are streamed, each with what is before its temporal half; and what is after the last."""
        layers, last = layers_of(self.decoder)
        return layers[-len(streamed_resnets(self.decoder)) :], last

    def with_moments(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = channels_last(y)
        return last.to(self.left), *moments(last.flatten(1, 2))


class Head(Segment):
    def forward(self, latent: Tensor) -> Tensor:
        """[F,4,h,w] -> [F,h,w,C]: all that is before the streamed blocks but the upsampling into them."""
        decoder = self.decoder
        video = torch.zeros(1, len(latent), dtype=self.dtype, device=latent.device)
        first, *others = decoder.mid_block.resnets
        x = first(decoder.conv_in(latent.to(self.dtype)), image_only_indicator=video)
        for attention, resnet in zip(decoder.mid_block.attentions, others, strict=False):
            attended = [attention(part) for part in x.split(ATTENDED)]
            x = resnet(torch.cat(attended), image_only_indicator=video)
        blocks = decoder.up_blocks[:-STREAMED_BLOCKS]
        for number, block in enumerate(blocks, 1):
            for resnet in block.resnets:
                x = resnet(x, image_only_indicator=video)
            for upsampler in block.upsamplers if number < len(blocks) else ():
                x = upsampler(x)
        return channels_last(x).to(self.left)


class Front(Segment):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[n,h,w,C] -> what the first streamed resnet's temporal half reads, and its moments."""
        ((before, _), *_), _ = self.layers()
        first = before[-2:] if len(self.decoder.up_blocks) > STREAMED_BLOCKS else before[-1:]
        return self.with_moments(through(first, channels_first(x.to(self.dtype))))


class MomentsOfResnet(Segment):
    def forward(self, x: Tensor, inside: Tensor, mean1: Tensor, variance1: Tensor) -> FrameMoments:
        """[n+2,h,w,C] -> moments of what the second norm reads."""
        temporal = self.layers()[0][self.layer][1].temporal_res_block
        h = normalised(temporal.norm1, x, inside, mean1, variance1).to(self.dtype)
        return moments(convolved(temporal.conv1, h.flatten(1, 2)))


class Layer(Segment):
    def forward(
        self, x: Tensor, inside: Tensor, mean1: Tensor, variance1: Tensor, mean2: Tensor, variance2: Tensor
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """[n+4,h,w,C] -> the resnet's temporal half, its blend, and all up to the next temporal half."""
        layers, last = self.layers()
        resnet = layers[self.layer][1]
        temporal = resnet.temporal_res_block
        h = normalised(temporal.norm1, x, inside, mean1, variance1).to(self.dtype).flatten(1, 2)
        h = convolved(temporal.conv1, h).unflatten(1, x.shape[1:3])
        h = normalised(temporal.norm2, h, inside[1:-1], mean2, variance2).to(self.dtype).flatten(1, 2)
        h = convolved(temporal.conv2, h).unflatten(1, x.shape[1:3])
        x, h = channels_first(x[2:-2].to(self.dtype)), channels_first(h)
        mixed = resnet.time_mixer(x_spatial=x, x_temporal=x + h, image_only_indicator=None)
        if self.layer + 1 == len(layers):
            return through(last, mixed).to(self.left)
        return self.with_moments(through(layers[self.layer + 1][0], mixed))


class Finish(Segment):
    def forward(self, images: Tensor) -> Tensor:
        """[F,3,H,W] -> [F,3,H,W]: the convolution over all frames."""
        video = images.to(self.dtype).transpose(0, 1)[None]
        pixels: Tensor = self.decoder.time_conv_out(video)[0].transpose(0, 1)
        return pixels.to(self.left)


def convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of three frames, where all three are there: [n,h*w,C] -> [n-2,h*w,C']."""
    return valid_by_channel(conv, x.permute(2, 0, 1)).permute(1, 2, 0)


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def moments(x: Tensor) -> FrameMoments:
    """Mean and variance of each frame and group: [n,h*w,C] -> [n,G] twice.

    In sums of float32.  The variance is that around the mean as the network's type has it, corrected: so a
    compiler reads what is in that type, and writes no float32 copy of it.
    """
    groups = x.unflatten(2, (GROUPS, -1))  # [n, h*w, G, C/G]
    mean = groups.float().mean((1, 3), keepdim=True)
    near = mean.to(x.dtype)
    square = (groups - near).float().square().mean((1, 3), keepdim=True)
    variance = square - (mean - near.float()).square()
    return mean.flatten(1), variance.flatten(1)


def normalised(norm: nn.GroupNorm, x: Tensor, inside: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """SiLU of x [n,h,w,C], normalised by statistics [G]; zeros for frames that are not inside.  float32."""
    each = norm.num_channels // norm.num_groups
    deviation, mean = (t[:, None].expand(-1, each).flatten() for t in ((variance + norm.eps).sqrt(), mean))
    scale = norm.weight.float() / deviation
    shift = norm.bias.float() - mean * scale
    return F.silu(x.float() * scale + shift) * inside
