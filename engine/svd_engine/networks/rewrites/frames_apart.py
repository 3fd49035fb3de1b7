"""The VAE decoder's work on single frames, one frame after the other.

    f([x_1 ... x_F]) = [f(x_1) ... f(x_F)]

for everything in the decoder but the temporal halves of its resnets, time_conv_out and the attention in
its middle, which take all frames as before.  What a frame's norms, activations and convolutions hand each
other then lies in a CPU's cache, and is one frame large instead of all.  The copies that put frames side by
side for a temporal half, and take them apart after it, are those that swapped frames and channels.
In diffusers: TemporalDecoder.forward, MidBlockTemporalDecoder and UpBlockTemporalDecoder.
"""

from __future__ import annotations

from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder, UpBlockTemporalDecoder
from torch import Tensor, nn

from svd_engine.networks.rewrites._places import Report, parts, rewrite_each
from svd_engine.networks.rewrites._resnets import VideoResBlock, adopt_resnet, half, obstacle_to_adoption
from svd_engine.networks.single_frames import SingleFrames


def apply(network: nn.Module) -> Report:
    places = [("the whole network", network)] if isinstance(network, TemporalDecoder) else []
    return rewrite_each([p for p in places if type(p[1]) is not FramesApart], obstacle, rewrite, network)


def obstacle(decoder: TemporalDecoder) -> str | None:
    blocks = (decoder, decoder.mid_block, *decoder.up_blocks)
    expected = (
        TemporalDecoder,
        MidBlockTemporalDecoder,
        *(UpBlockTemporalDecoder for _ in decoder.up_blocks),
    )
    for block, kind in zip(blocks, expected, strict=True):
        if type(block) is not kind:
            return f"{type(block).__name__} has a forward of its own"
    for path, resnet in parts(decoder, SpatioTemporalResBlock):
        reason = obstacle_to_adoption(resnet)
        if reason is not None:
            return f"{path}: {reason}"
    return None


def rewrite(decoder: TemporalDecoder) -> None:
    for _, resnet in parts(decoder, SpatioTemporalResBlock):
        adopt_resnet(resnet)
    decoder.__class__ = FramesApart


class FramesApart(TemporalDecoder):  # type: ignore[misc]  # diffusers is untyped
    def forward(self, sample: Tensor, image_only_indicator: Tensor, num_frames: int = 1) -> Tensor:
        """[B*F,4,h,w] -> [B*F,3,H,W]; the indicator [B,F] says how many frames a video has."""
        video = (len(sample) // num_frames, num_frames)
        frames = SingleFrames.of(self.conv_in(sample).unflatten(0, video), 1)

        first, *others = self.mid_block.resnets
        frames = resnet_of_frames(first, frames, image_only_indicator)
        for attention, resnet in zip(self.mid_block.attentions, others, strict=False):
            attended = attention(frames.together(1).flatten(0, 1))
            frames = SingleFrames.of(attended.unflatten(0, video), 1)
            frames = resnet_of_frames(resnet, frames, image_only_indicator)
        for block in self.up_blocks:
            for resnet in block.resnets:
                frames = resnet_of_frames(resnet, frames, image_only_indicator)
            for upsampler in block.upsamplers or ():
                frames = frames.map(upsampler)

        images = frames.map(lambda frame: self.conv_out(self.conv_act(self.conv_norm_out(frame))))
        pixels: Tensor = self.time_conv_out(images.together(2))  # [B, 3, F, H, W]
        return pixels.transpose(1, 2).flatten(0, 1)


def resnet_of_frames(
    resnet: VideoResBlock, frames: SingleFrames, image_only_indicator: Tensor
) -> SingleFrames:
    spatial = frames.map(lambda frame: half(resnet.spatial_res_block, frame, None))
    x = resnet.over_frames(spatial.together(2), None, image_only_indicator)  # [B, C, F, h, w]
    return SingleFrames.of(x, 2)
