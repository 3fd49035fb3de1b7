"""The VAE decoder as a chain of networks over a few frames at a time, its *segments*: the same video, exact.

The group norms of temporal resnets take their statistics over all frames, so a stream of frames stops at
each of them.  The chain of a decoder with L streamed resnets:

    head                    latent of all frames -> activations x of all frames, where they are still small
    front                   slice of x -> slice of y, and its moments
    moments  } of each      window of y -> moments of what the resnet's second norm reads
    layer    } resnet       window of y -> slice of the next y, and its moments; of the last one, images
    finish                  images of all frames -> frames

A window is a slice with the frames that temporal convolutions read on either side of it: one for `moments`,
two for `layer`.  `inside` is 1 for frames of the video and 0 for those beyond its ends, which are zeros to a
convolution.  Moments are the mean and the variance of each frame and group; whoever runs the chain makes
those of the video of them.  Activations between segments have the type that the network computes in, and
the channels of a pixel side by side, [n,h,w,C]: so TensorRT's kernels take and leave them as they are.

Letters in shapes: n frames of a slice, F frames of the video, C channels, G groups, h w their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from svd_engine.spec.bounds import Channels, Frames, PixelScale
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec, TensorSpec

Tensors = tuple[TensorSpec, ...]
SEGMENT = "decoder_segment"  # its networks' name
GROUPS = 32  # of a norm in diffusers' TemporalDecoder
STREAMED_BLOCKS = 2  # upward blocks that are streamed, of the most pixels: what is before them is small
HEAD, FRONT = 0, 1  # numbers of segments; then two for each layer, then `Streaming.finish`
REACH = {"moments": 1, "layer": 2}  # frames on either side of a slice


@dataclass(frozen=True)
class Activations:
    """What one frame leaves between two segments."""

    channels: Channels
    downscale: PixelScale  # of the video's pixels


@dataclass(frozen=True)
class Streaming:
    """How a decoder is cut into segments."""

    slice_frames: Frames  # that a segment takes at a time
    head: Activations  # that the head leaves
    layers: Annotated[tuple[Activations, ...], Field(min_length=1, max_length=64)]  # before each resnet

    @property
    def finish(self) -> int:
        """The number of the last segment."""
        return FRONT + 2 * len(self.layers) + 1


def streaming_of(channels: Sequence[int], layers: int, slice_frames: int) -> Streaming:
    """Of a decoder of so many channels a level, the outermost first.

    layers: resnets of a level of the encoder; a decoder's has one more.
    """
    streamed = range(min(STREAMED_BLOCKS, len(channels)))[::-1]  # levels, the innermost first
    before = min(len(streamed), len(channels) - 1)  # the level that the head ends with
    return Streaming(
        slice_frames,
        Activations(channels[before], 2**before),
        tuple(Activations(channels[level], 2**level) for level in streamed for _ in range(layers + 1)),
    )


def segments_of(decoder: StreamedSpec, streaming: Streaming) -> tuple[NetworkSpec, ...]:
    """The chain that stands for a decoder of all frames, in its order."""
    (latent,), (images,) = decoder.inputs, decoder.outputs
    frames, _, height, width = images.shape
    size, kind = streaming.slice_frames, decoder.precision.activations

    def activations(name: str, of: Activations, count: int) -> TensorSpec:
        return TensorSpec(name, (count, height // of.downscale, width // of.downscale, of.channels), kind)

    def window(of: Activations, step: str) -> tuple[TensorSpec, ...]:
        count = size + 2 * REACH[step]
        return activations("x", of, count), TensorSpec("inside", (count, 1, 1, 1))

    def statistics(number: int) -> tuple[TensorSpec, ...]:
        """Of the video, at norm 1 or 2 of a resnet."""
        return TensorSpec(f"mean{number}", (GROUPS,)), TensorSpec(f"variance{number}", (GROUPS,))

    moments = TensorSpec("mean", (size, GROUPS)), TensorSpec("variance", (size, GROUPS))
    chain: list[tuple[Tensors, Tensors]] = [  # inputs and outputs of each
        ((latent,), (activations("y", streaming.head, frames),)),
        ((activations("x", streaming.head, size),), (activations("y", streaming.layers[0], size), *moments)),
    ]
    for layer, following in zip(streaming.layers, (*streaming.layers[1:], None), strict=True):
        made = (
            (activations("y", following, size), *moments)
            if following
            else (TensorSpec("images", (size, *images.shape[1:])),)
        )
        chain += [
            ((*window(layer, "moments"), *statistics(1)), moments),
            ((*window(layer, "layer"), *statistics(1), *statistics(2)), made),
        ]
    chain.append(((TensorSpec("images", images.shape),), (images,)))
    key = decoder.key.replace(decoder.network, SEGMENT)
    return tuple(
        NetworkSpec(SEGMENT, f"{key}-{number:02}", inputs, outputs, decoder.precision, segment=number)
        for number, (inputs, outputs) in enumerate(chain)
    )
