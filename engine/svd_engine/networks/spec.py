"""The tensor table of each network: name, dtype, shape.  Knows nothing of how anything runs.

Letters in shapes: B videos, F frames, T frames of one decode chunk, H W pixels, h w latent pixels
(H/8, W/8), C latent channels (4).  Every tensor that crosses a network's boundary is float32, whatever
the network computes in, so a host in any language needs one element type.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

from pydantic import Field

from svd_engine.bounds import (
    TENSOR_VALUES,
    VIDEO_PIXELS,
    Batch,
    Channels,
    ClipPixels,
    Frames,
    LatentChannels,
    Pixels,
    Scale,
    Side,
)

Guidance = Literal["batched", "single"]


@dataclass(frozen=True)
class Architecture:
    """What the tensor tables need to know of a checkpoint's networks.  Defaults are SVD's."""

    clip_size: ClipPixels = 224  # pixels, height and width of the image encoder's input
    embedding_dim: Channels = 1024
    latent_channels: LatentChannels = 4
    vae_scale: Scale = 8  # pixels per latent pixel
    size_multiple: Scale = 64  # pixels: vae_scale times the UNet's own downsampling


@dataclass(frozen=True)
class Profile:
    """The static shapes that one set of engines serves."""

    frames: Frames
    height: Pixels
    width: Pixels
    batch: Batch = 1  # videos per call
    guidance: Guidance = "batched"  # batched: both CFG halves inside one call; single: one half a call
    decode_chunk: Frames = 14  # frames the decoder takes at once

    @property
    def chunks(self) -> tuple[int, ...]:
        """Frames of each decoder call, in order: equal chunks and what remains.  Sums to `frames`."""
        whole, rest = divmod(self.frames, self.decode_chunk)
        return (self.decode_chunk,) * whole + ((rest,) if rest else ())

    def __str__(self) -> str:
        return (
            f"{self.frames} frames, {self.height}x{self.width}, batch {self.batch}, "
            f"{self.guidance} guidance, decode chunk {self.decode_chunk}"
        )


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: Annotated[tuple[Side, ...], Field(max_length=8)]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class NetworkSpec:
    """One network at one static shape.  `key` is unique within a bundle and names its file there."""

    network: str
    key: str
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=64)]
    output: TensorSpec


NETWORKS = ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")


def image_encoder(profile: Profile, arch: Architecture) -> NetworkSpec:
    """CLIP: normalised pixels to one embedding token."""
    b, s = profile.batch, arch.clip_size
    return NetworkSpec(
        "image_encoder",
        f"image_encoder-b{b}",
        (TensorSpec("pixels", (b, 3, s, s)),),
        TensorSpec("embedding", (b, 1, arch.embedding_dim)),
    )


def vae_encoder(profile: Profile, arch: Architecture) -> NetworkSpec:
    """VAE encoder: pixels in [-1, 1] to the mode of the latent distribution, not scaled."""
    b, hw = profile.batch, (profile.height, profile.width)
    return NetworkSpec(
        "vae_encoder",
        f"vae_encoder-b{b}-{hw[0]}x{hw[1]}",
        (TensorSpec("pixels", (b, 3, *hw)),),
        TensorSpec("latent", (b, arch.latent_channels, *_latent(profile, arch))),
    )


def denoiser(profile: Profile, arch: Architecture) -> NetworkSpec:
    """D(x; sigma) of Karras et al. 2022, eq. 7: preconditioning, and in `batched` mode guidance, inside."""
    b, f, c = profile.batch, profile.frames, arch.latent_channels
    video = (b, f, c, *_latent(profile, arch))
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("x", video),
        TensorSpec("sigma", ()),
        TensorSpec("first_latent", (b, c, *_latent(profile, arch))),
        TensorSpec("embedding", (b, 1, arch.embedding_dim)),
        TensorSpec("time_ids", (b, 3)),  # fps - 1, motion bucket, noise augmentation
    )
    if profile.guidance == "batched":
        inputs += (TensorSpec("guidance", (b, f)),)
    key = f"denoiser-b{b}-f{f}-{profile.height}x{profile.width}-{profile.guidance}"
    return NetworkSpec("denoiser", key, inputs, TensorSpec("denoised", video))


def vae_decoder(profile: Profile, arch: Architecture, frames: int) -> NetworkSpec:
    """Temporal VAE decoder: `frames` consecutive latents of one video to pixels in about [-1, 1]."""
    return NetworkSpec(
        "vae_decoder",
        f"vae_decoder-t{frames}-{profile.height}x{profile.width}",
        (TensorSpec("latent", (frames, arch.latent_channels, *_latent(profile, arch))),),
        TensorSpec("frames", (frames, 3, profile.height, profile.width)),
    )


def specs_of(profile: Profile, arch: Architecture) -> list[NetworkSpec]:
    """Every network that `profile` needs, in the order in which the pipeline calls them."""
    decoders = [vae_decoder(profile, arch, t) for t in dict.fromkeys(profile.chunks)]
    return [image_encoder(profile, arch), vae_encoder(profile, arch), denoiser(profile, arch), *decoders]


def too_large(profile: Profile, arch: Architecture) -> str:
    """What in `profile` is larger than a bundle may ask for, each number alone being in range; else empty."""
    pixels = profile.batch * profile.frames * profile.height * profile.width
    if pixels > VIDEO_PIXELS:
        return f"{pixels:,} pixels in one call ({profile}), at most {VIDEO_PIXELS:,}"
    for spec in specs_of(profile, arch):
        for tensor in (*spec.inputs, spec.output):
            if prod(tensor.shape) > TENSOR_VALUES:
                return f"{prod(tensor.shape):,} values in {tensor} of {spec.key}, at most {TENSOR_VALUES:,}"
    return ""


def _latent(profile: Profile, arch: Architecture) -> tuple[int, int]:
    return profile.height // arch.vae_scale, profile.width // arch.vae_scale
