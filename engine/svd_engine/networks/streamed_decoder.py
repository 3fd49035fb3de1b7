"""The temporal VAE decoder over a few frames at a time, with the result of decoding all frames at once.

Three kinds of layers make TemporalDecoder.  Most work on each frame alone.  Convolutions over frames read a
frame on either side, so a stream of frames passes through one with two frames held back.  Only the group
norms of temporal resnets need every frame before they give the first: their statistics are over all of a
video.  So the frames pass once for each of these norms: its mean and variance are added up while they do,
and the next pass normalises.  Between passes the activations of one layer, of all frames, are parked in host
memory; nothing else is ever held of more than a slice.  The first convolution of a temporal resnet runs
twice, which costs less than parking its output.

Exact: differs from the whole decoder in the order of sums.  Variances are combined as in Chan, Golub and
LeVeque 1983, eq. 2.1.  Source: forward of TemporalDecoder, SpatioTemporalResBlock and TemporalResnetBlock.

Letters in shapes: n frames of a slice, F frames of the video, C channels, h w pixels, G groups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import TemporalDecoder
from diffusers.models.resnet import AlphaBlender, SpatioTemporalResBlock
from diffusers.models.unets.unet_3d_blocks import MidBlockTemporalDecoder, UpBlockTemporalDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from svd_engine.errors import SettingsError
from svd_engine.networks.rewrites._resnets import half, obstacle_to_adoption
from svd_engine.networks.rewrites.frames_apart import FramesApart
from svd_engine.networks.rewrites.frames_in_groups import FramesInGroups
from svd_engine.spec.network import OnPart, unheard

if TYPE_CHECKING:
    from diffusers import AutoencoderKLTemporalDecoder

KNOWN = (TemporalDecoder, FramesApart, FramesInGroups)  # whose layers a stream can run
PerFrame = Callable[[Tensor], Tensor]  # [n,C,h,w] -> [n,C',h',w'], each frame alone


class StreamedDecoder(nn.Module):
    """Latent of all F frames of one video [F,4,h,w] -> frames [F,3,H,W], as `VaeDecoder`, float32.

    slice_frames: frames at a time; fewer take less memory.  Takes the decoder with or without exact
    rewrites.  Raises SettingsError for a decoder of other layers than diffusers'.
    """

    def __init__(self, vae: AutoencoderKLTemporalDecoder, slice_frames: int) -> None:
        super().__init__()
        reason = obstacle(vae.decoder)
        if reason is not None:
            raise SettingsError(
                "decoding",
                expected="a decoder of diffusers' layers to stream",
                got=reason,
                remedy='Use decoding="whole", or decode_chunk_size for less memory.',
            )
        self.decoder = vae.decoder
        self.slice_frames = slice_frames
        self.parking: Parking | None = None  # None: the device's own

    @torch.no_grad()
    def forward(self, latent: Tensor, on_part: OnPart = unheard) -> Tensor:
        """on_part: is told after each slice; a part is a frame of a pass."""
        parking = self.parking or parking_for(latent.device)
        layers, last = layers_of(self.decoder)
        parts, done = len(latent) * (2 * len(layers) + 1), 0  # frames, of all passes

        def passed(part: Tensor) -> None:
            nonlocal done
            done += len(part)
            on_part(done, parts)

        stream: Iterable[Tensor] = latent.to(next(self.decoder.parameters()).dtype).split(self.slice_frames)
        for before, resnet in layers:
            stream = temporal_half(
                resnet, map(partial(through, before), stream), parking, self.slice_frames, passed
            )
        frames = []
        for part in over_frames(self.decoder.time_conv_out, map(partial(through, last), stream)):
            frames.append(part.float())
            passed(part)
        return torch.cat(frames)


def obstacle(decoder: nn.Module) -> str | None:
    """Why a decoder cannot be streamed."""
    if not isinstance(decoder, TemporalDecoder) or type(decoder) not in KNOWN:
        return f"{type(decoder).__name__}, not diffusers' TemporalDecoder"
    kinds = (MidBlockTemporalDecoder, *(UpBlockTemporalDecoder for _ in decoder.up_blocks))
    for block, kind in zip((decoder.mid_block, *decoder.up_blocks), kinds, strict=True):
        if type(block) is not kind:
            return f"{type(block).__name__} has a forward of its own"
    for resnet in decoder.modules():
        if isinstance(resnet, SpatioTemporalResBlock) and (reason := obstacle_in_resnet(resnet)):
            return reason
    return None


def obstacle_in_resnet(resnet: SpatioTemporalResBlock) -> str | None:
    mixer = resnet.time_mixer
    if isinstance(mixer, AlphaBlender) and mixer.merge_strategy == "learned_with_images":
        return "a resnet that blends by the image indicator"
    if resnet.temporal_res_block.conv_shortcut is not None:
        return "a temporal resnet that changes the number of channels"
    return obstacle_to_adoption(resnet)


def layers_of(
    decoder: TemporalDecoder,
) -> tuple[list[tuple[list[PerFrame], SpatioTemporalResBlock]], list[PerFrame]]:
    """Each resnet with what single frames go through before its temporal half, and what is after the last."""
    first, *others = decoder.mid_block.resnets
    parts = [first]
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=False):
        parts += [attention, resnet]
    for block in decoder.up_blocks:
        parts += [*block.resnets, *(block.upsamplers or ())]

    layers, before = [], [decoder.conv_in]
    for part in parts:
        if isinstance(part, SpatioTemporalResBlock):
            layers.append(([*before, spatial_half(part)], part))
            before = []
        else:
            before.append(part)
    return layers, [*before, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]


def spatial_half(resnet: SpatioTemporalResBlock) -> PerFrame:
    return lambda x: half(resnet.spatial_res_block, x, None)


def through(steps: Iterable[PerFrame], part: Tensor) -> Tensor:
    """A slice, through one step after the other."""
    for step in steps:
        part = step(part)
    return part


def temporal_half(
    resnet: SpatioTemporalResBlock,
    stream: Iterable[Tensor],
    parking: Parking,
    slice_frames: int,
    passed: Callable[[Tensor], None],
) -> Iterator[Tensor]:
    """The temporal half of a resnet and its blend: slices [n,C,h,w] -> the same frames in other slices.

    `passed` is told of each slice of the two passes that are made at once; the third is made as its slices
    are asked for.  A `map` stands where a generator would hold on to its last slice.
    """
    temporal = resnet.temporal_res_block
    first, second = Moments(temporal.norm1), Moments(temporal.norm2)

    parked: deque[Tensor] = deque()  # [1,C,h,w] each
    for part in stream:
        first.add(part)
        parked.extend(map(parking.put, part.split(1)))
        passed(part)
        del part

    for part in over_frames(
        temporal.conv1, map(first.normalised, taken_back(parked.copy(), parking, slice_frames))
    ):
        second.add(part)
        passed(part)
        del part

    shortcut: deque[Tensor] = deque()  # frames on their way around the convolutions

    def both_ways() -> Iterator[Tensor]:
        for part in taken_back(parked, parking, slice_frames):
            shortcut.extend(part.split(1))
            yield part

    def blended(convolved: Tensor) -> Tensor:
        x = joined([shortcut.popleft() for _ in range(len(convolved))])
        mixed: Tensor = resnet.time_mixer(x_spatial=x, x_temporal=x + convolved, image_only_indicator=None)
        return mixed

    between = over_frames(temporal.conv1, map(first.normalised, both_ways()))
    return map(blended, over_frames(temporal.conv2, map(second.normalised, between)))


def taken_back(parked: deque[Tensor], parking: Parking, slice_frames: int) -> Iterator[Tensor]:
    """Parked frames in slices, taken out of `parked`, so that their memory is free."""
    while parked:
        count = min(slice_frames, len(parked))
        yield joined([parking.get(parked.popleft()) for _ in range(count)])


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def over_frames(conv: nn.Module, stream: Iterable[Tensor]) -> Iterator[Tensor]:
    """A convolution of three frames with a zero frame at both ends, as its slices come: one frame late.

    conv: Conv3d (3,1,1), or the TemporalConv2d that stands for it.
    """
    held: Tensor | None = None  # the last two frames, which the next output reads
    for part in stream:
        window = [torch.cat([torch.zeros_like(part[:1]) if held is None else held, part])]
        del part  # nothing but the two frames stays while a later layer runs
        held = window[0][-2:].clone()
        if len(window[0]) > 2:
            yield valid(conv, window.pop())
        window.clear()
    assert held is not None  # a video has a frame
    yield valid(conv, torch.cat([held, torch.zeros_like(held[:1])]))


def valid(conv: nn.Module, x: Tensor) -> Tensor:
    """[n,C,h,w] -> [n-2,C',h,w]: the outputs whose three frames are there."""
    pixels = valid_by_channel(conv, x.transpose(0, 1).flatten(2)).transpose(0, 1)  # [n-2, C', h*w]
    return pixels.reshape(*pixels.shape[:2], *x.shape[2:])


def valid_by_channel(conv: nn.Module, x: Tensor) -> Tensor:
    """The same for flat pixels: [C,n,h*w] -> [C',n-2,h*w]."""
    assert isinstance(conv.weight, Tensor)
    weight = conv.weight.flatten(2)[..., None]  # [C', C, 3, 1]
    bias = conv.bias if isinstance(conv.bias, Tensor) else None
    return F.conv2d(x[None], weight, bias)[0]


class Moments:
    """A group norm whose statistics are over all frames, added up in slices; they are float32 or better."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.count = 0  # of values in a group
        self.mean: Tensor | float = 0.0  # [G], float64
        self.squares: Tensor | float = 0.0  # [G], of what differs from the mean

    def add(self, part: Tensor) -> None:
        """Adds a slice [n,C,h,w]."""
        for frame in part:
            groups = frame.reshape(self.norm.num_groups, -1).float()
            variance, mean = (t.double() for t in torch.var_mean(groups, dim=1, correction=0))
            added, count = groups.shape[1], self.count + groups.shape[1]
            apart = mean - self.mean
            self.squares = self.squares + variance * added + apart**2 * (self.count * added / count)
            self.mean = self.mean + apart * (added / count)
            self.count = count

    def normalised(self, part: Tensor) -> Tensor:
        """SiLU of the normalised slice, in its type."""
        deviation = (torch.as_tensor(self.squares) / self.count + self.norm.eps).sqrt()  # [G]
        per_group = self.norm.num_channels // self.norm.num_groups
        scale = self.norm.weight / deviation.repeat_interleave(per_group)  # [C]
        shift = self.norm.bias - torch.as_tensor(self.mean).repeat_interleave(per_group) * scale
        scale, shift = (t.float()[:, None, None] for t in (scale, shift))
        return F.silu(torch.addcmul(shift, part, scale), inplace=True).to(part.dtype)


class Parking(Protocol):
    """Where the activations of a frame [1,C,h,w] wait between two passes."""

    def put(self, frame: Tensor) -> Tensor: ...

    def get(self, parked: Tensor) -> Tensor: ...


class InPlace:
    """On the CPU activations lie in host memory already."""

    def put(self, frame: Tensor) -> Tensor:
        return frame

    def get(self, parked: Tensor) -> Tensor:
        return parked


class InHostMemory:
    """Of a GPU: page-locked buffers, copied to and from in the order of the GPU's own stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def put(self, frame: Tensor) -> Tensor:
        buffer = torch.empty_like(frame, device="cpu", pin_memory=True)
        return buffer.copy_(frame, non_blocking=True)

    def get(self, parked: Tensor) -> Tensor:
        return parked.to(self.device, non_blocking=True)


def parking_for(device: torch.device) -> Parking:
    return InHostMemory(device) if device.type == "cuda" else InPlace()
