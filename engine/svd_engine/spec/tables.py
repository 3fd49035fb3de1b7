"""The tensor table of each network: name, dtype, shape.  Knows nothing of how anything runs.

Letters in shapes: B videos, F frames, T frames of one decode chunk, H W pixels, h w latent pixels
(H/8, W/8), C latent channels (4).  Every tensor that crosses a network's boundary is float32, whatever
the network computes in, so a host in any language needs one element type; activations between the segments
of a streamed decoder are not.
"""

from __future__ import annotations

from math import prod

from svd_engine.spec.bounds import TENSOR_VALUES, VIDEO_PIXELS
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32, Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import SHALLOW, Feature, reusing_specs
from svd_engine.spec.streaming import SEGMENT, Streaming, segments_of
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec, TensorSpec

NETWORKS = ("image_encoder", "vae_encoder", "denoiser", SHALLOW, "vae_decoder", SEGMENT)


def image_encoder(profile: Profile, arch: Architecture, precision: Precision) -> NetworkSpec:
    """CLIP: normalised pixels to one embedding token."""
    b, s = profile.batch, arch.clip_size
    return NetworkSpec(
        "image_encoder",
        f"image_encoder-b{b}",
        (TensorSpec("pixels", (b, 3, s, s)),),
        (TensorSpec("embedding", (b, 1, arch.embedding_dim)),),
        precision,
    )


def vae_encoder(profile: Profile, arch: Architecture) -> NetworkSpec:
    """VAE encoder: pixels in [-1, 1] to the mode of the latent distribution, not scaled.

    float32 always: SVD's encoder overflows in float16 (`force_upcast` in the checkpoint's config).
    """
    b, hw = profile.batch, (profile.height, profile.width)
    return NetworkSpec(
        "vae_encoder",
        f"vae_encoder-b{b}-{hw[0]}x{hw[1]}",
        (TensorSpec("pixels", (b, 3, *hw)),),
        (TensorSpec("latent", (b, arch.latent_channels, *_latent(profile, arch))),),
        FLOAT32,
    )


def denoiser(profile: Profile, arch: Architecture, precision: Precision) -> NetworkSpec:
    """D(x; sigma) of Karras et al. 2022, eq. 7: preconditioning, and in `batched` mode guidance, inside."""
    b, f, c = profile.batch, profile.frames, arch.latent_channels
    video = (b, f, c, *_latent(profile, arch))
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("x", video),
        TensorSpec("sigma", ()),
        TensorSpec("first_latent", (b, c, *_latent(profile, arch))),
        TensorSpec("embedding", (b, 1, arch.embedding_dim)),
        TensorSpec("time_ids", arch.conditioning.shape(b, f)),
    )
    if profile.guidance == "batched":
        inputs += (TensorSpec("guidance", (b, f)),)
    key = f"denoiser-b{b}-f{f}-{profile.height}x{profile.width}-{profile.guidance}"
    outputs = (TensorSpec("denoised", video),)
    return NetworkSpec("denoiser", key, inputs, outputs, precision, profile.guidance)


def vae_decoder(profile: Profile, arch: Architecture, precision: Precision, frames: int) -> NetworkSpec:
    """Temporal VAE decoder: `frames` consecutive latents of one video to pixels in about [-1, 1]."""
    return NetworkSpec(
        "vae_decoder",
        f"vae_decoder-t{frames}-{profile.height}x{profile.width}",
        (TensorSpec("latent", (frames, arch.latent_channels, *_latent(profile, arch))),),
        (TensorSpec("frames", (frames, 3, profile.height, profile.width)),),
        precision,
    )


def streamed_decoder(
    profile: Profile, arch: Architecture, precision: Precision, slice_frames: int
) -> StreamedSpec:
    """The decoder of all frames at once, run over `slice_frames` at a time: same tensors, same result."""
    whole = vae_decoder(profile, arch, precision, profile.frames)
    key = f"{whole.key}-streamed{slice_frames}"
    return StreamedSpec(whole.network, key, whole.inputs, whole.outputs, precision, slice_frames=slice_frames)


def specs_of(
    profile: Profile,
    arch: Architecture,
    precision: Precision,
    slice_frames: int | None = None,
    feature: Feature | None = None,
) -> list[NetworkSpec]:
    """Every network that `profile` needs, in the order in which the pipeline calls them.

    precision: of all but the VAE encoder, which has its own.  slice_frames: those that a streamed decoder
    holds at a time; None is a decoder of the profile's chunks.  feature: that is reused between evaluations,
    by a full and a shallow denoiser in place of one.
    """
    plain = denoiser(profile, arch, precision)
    decoders = (
        [vae_decoder(profile, arch, precision, frames) for frames in dict.fromkeys(profile.chunks)]
        if slice_frames is None
        else [streamed_decoder(profile, arch, precision, slice_frames)]
    )
    return [
        image_encoder(profile, arch, precision),
        vae_encoder(profile, arch),
        *(reusing_specs(plain, feature) if feature else (plain,)),
        *decoders,
    ]


def segments(
    profile: Profile, arch: Architecture, precision: Precision, streaming: Streaming
) -> tuple[NetworkSpec, ...]:
    """The networks of the profile's streamed decoder, in its order."""
    return segments_of(streamed_decoder(profile, arch, precision, streaming.slice_frames), streaming)


def too_large(
    profile: Profile,
    arch: Architecture,
    feature: Feature | None = None,
    streaming: Streaming | None = None,
) -> str:
    """What in `profile` is larger than a bundle may ask for, each number alone being in range; else empty.

    feature: that its denoisers reuse.  streaming: of its streamed decoder.
    """
    pixels = profile.batch * profile.frames * profile.height * profile.width
    if pixels > VIDEO_PIXELS:
        return f"{pixels:,} pixels in one call ({profile}), at most {VIDEO_PIXELS:,}"
    specs = specs_of(profile, arch, FLOAT32)  # of any precision: shapes are the same
    more = (
        *(reusing_specs(specs[2], feature) if feature else ()),
        *(segments(profile, arch, FLOAT32, streaming) if streaming else ()),
    )
    for spec in (*specs, *more):
        for tensor in (*spec.inputs, *spec.outputs):
            if prod(tensor.shape) > TENSOR_VALUES:
                return f"{prod(tensor.shape):,} values in {tensor} of {spec.key}, at most {TENSOR_VALUES:,}"
    return ""


def _latent(profile: Profile, arch: Architecture) -> tuple[int, int]:
    return profile.height // arch.vae_scale, profile.width // arch.vae_scale
