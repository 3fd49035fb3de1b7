"""Photograph -> video, top to bottom: every stage and every tensor shape.

Knows nothing of backends, files or arguments.  Letters in shapes: N videos, B videos per network call,
F frames, T frames of a decode chunk, H W pixels, h w latent pixels (H/8, W/8), D embedding.
Arithmetic outside the networks is float32.  Follows diffusers'
`StableVideoDiffusionPipeline.__call__`; the two places that differ say so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import torch
from torch import Tensor

from svd_engine.clock import Clock
from svd_engine.errors import NonFiniteOutput, SettingsError
from svd_engine.guidance_parallel import OtherHalf
from svd_engine.image_conditioning import ImageConditioning
from svd_engine.observer import UNOBSERVED, Observer, Step
from svd_engine.request import Settings
from svd_engine.sampling import guiders, schedules
from svd_engine.sampling.preconditioning import c_noise, initial_scale
from svd_engine.sampling.registry import GUIDERS, SAMPLERS, SCHEDULES, evaluations
from svd_engine.sampling.reuse import ReusePolicy
from svd_engine.sampling.samplers import Denoise, FreshNoise
from svd_engine.spec.model import Model
from svd_engine.spec.network import Network, OnPart
from svd_engine.spec.profile import Profile
from svd_engine.steering import Steering

Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[[int, Tensor, Tensor], Tensor]  # (step, c_noise, latents) -> latents


class Bar(Protocol):
    """tqdm's, say."""

    def update(self) -> object:
        """Count one more."""


class _Hidden:
    def update(self) -> None:
        """Show nothing."""


ProgressBar = Callable[[int], AbstractContextManager[Bar]]  # evaluations of the denoiser -> a bar for them


def hidden(_evaluations: int) -> AbstractContextManager[Bar]:
    return nullcontext(_Hidden())


@dataclass(frozen=True)
class Stages:
    """The networks of one profile, opened."""

    profile: Profile
    image_encoder: Network | None  # None, both, for a call that brings what they would give
    vae_encoder: Network | None
    denoiser: Network
    vae_decoders: Mapping[int, Network]  # by frames of a chunk
    other_half: OtherHalf | None = None  # of guidance, when it has a device of its own


@dataclass(frozen=True)
class ImagePixels:
    """Images, as their two encoders read them."""

    vae: Tensor  # [images, 3, H, W] in [-1, 1]
    clip: Tensor  # [images, 3, S, S], normalised for CLIP

    @property
    def images(self) -> int:
        return len(self.vae)


class Reusing:
    """A shallow denoiser beside the full one of `Stages`, for one call: see `spec.reuse`."""

    def __init__(self, shallow: Network, policy: ReusePolicy) -> None:
        self.network, self.policy = shallow, policy
        self.shallow: list[int] = []  # evaluations that reused, from 0
        self._done = 0
        self._features: dict[str, Tensor] = {}  # by half of guidance, of the last full evaluation

    def begin(self, x: Tensor, sigma: Tensor, halves: Collection[str]) -> None:
        """Decide on the next evaluation, which runs `halves`."""
        if self.policy.reuses(x, sigma, possible=self._features.keys() >= set(halves)):
            self.shallow.append(self._done)
        else:
            self._features.clear()
        self._done += 1

    def __call__(self, full: Network, batch: int, half: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """D of one half, or of both at once: from the feature where there is one, else leaving one."""
        if half in self._features:
            return in_batches(self.network, batch, **inputs, feature=self._features[half])["denoised"]
        outputs = in_batches(full, batch, **inputs)
        self._features[half] = outputs["feature"].clone()  # the network's next run writes over it
        return outputs["denoised"]


def generate(
    stages: Stages,
    model: Model,
    settings: Settings,
    image: ImagePixels | ImageConditioning,
    generator: Generators,
    latents: Tensor | None,  # [N, F, 4, h, w] of standard deviation 1, or None to draw them
    on_step: StepCallback,
    clock: Clock,
    decode: bool = True,
    steering: Steering | None = None,  # None: what `settings` say, to the end
    progress: ProgressBar = hidden,
    observer: Observer = UNOBSERVED,
    reusing: Reusing | None = None,  # None: every evaluation runs the whole denoiser
) -> Tensor:
    """Frames [N,F,3,H,W] in [0, 1], or with `decode` off the latents [N,F,4,h,w].  float32.

    N = images x videos_per_image, the videos of one image side by side.  Raises NonFiniteOutput with
    the network's name as soon as a stage gives NaN or infinity.
    """
    if isinstance(image, ImageConditioning):
        encoded = image
        if encoded.pixels is not None:
            observer.on_first_latent(encoded.pixels, encoded.first_latent)
    else:
        encoded = encode(stages, settings, image, generator, clock, observer)

    # diffusers orders several videos of several images differently for the two; here both are grouped
    embedding = encoded.embedding.repeat_interleave(settings.videos_per_image, dim=0)  # [N, 1, D]
    first_latent = encoded.first_latent.repeat_interleave(settings.videos_per_image, dim=0)  # [N, 4, h, w]

    with clock.stage("denoiser"):
        sigmas = schedule(settings, model).to(first_latent.device)  # [steps + 1]
        x = noise_video(first_latent, settings, generator, latents) * initial_scale(sigmas)
        steering = steering or steering_of(settings, len(x), x.device)
        told = model.architecture.conditioning.time_ids(settings.told, len(x), settings.frames, x.device)
        denoise = denoiser_call(stages, steering, told, embedding, first_latent, reusing)
        fresh = FreshNoise(lambda x: draw(x.shape, generator, x.device), settings.churn)
        x = sample(settings.sampler, denoise, x, sigmas, fresh, on_step, clock, steering, progress, observer)
        finite(x, stages.denoiser)
    if not decode:
        return x

    with clock.stage("vae_decoder"):
        frames = decode_video(stages, x / model.latent_scale, observer)
        if model.orbits and isinstance(image, ImagePixels):  # as sgm's `simple_video_sample.py`
            frames[:, -1] = (image.vae / 2 + 0.5).repeat_interleave(settings.videos_per_image, dim=0)
        return frames


def encode(
    stages: Stages,
    settings: Settings,
    image: ImagePixels,
    generator: Generators,
    clock: Clock,
    observer: Observer,
) -> ImageConditioning:
    """What the denoiser is given of the images, whose pixels for the VAE get noise first."""
    assert stages.image_encoder is not None  # opened for pixels
    assert stages.vae_encoder is not None
    batch = stages.profile.batch
    with clock.stage("image_encoder"):
        embedding = in_batches(stages.image_encoder, batch, pixels=image.clip)["embedding"]  # [images, 1, D]
        finite(embedding, stages.image_encoder)
    with clock.stage("vae_encoder"):
        noise = draw(image.vae.shape, generator, image.vae.device)
        noisy = image.vae + settings.noise_aug_strength * noise
        first_latent = in_batches(stages.vae_encoder, batch, pixels=noisy)["latent"]  # [images, 4, h, w]
        finite(first_latent, stages.vae_encoder)
    observer.on_first_latent(noisy, first_latent)
    return ImageConditioning(embedding, first_latent)


def schedule(settings: Settings, model: Model) -> Tensor:
    """Noise levels [steps + 1]: the caller's own, or the schedule's between the model's ends."""
    if settings.sigmas is not None:
        return schedules.given(settings.sigmas)
    levels = SCHEDULES[settings.schedule].levels
    return levels(settings.steps, model.sigma_min, model.sigma_max, settings.rho)


def steering_of(settings: Settings, videos: int, device: torch.device) -> Steering:
    """What a call starts with: all of its steps, and its guidance scales."""
    return Steering(settings.steps, guidance(settings, videos).to(device))


def guidance(settings: Settings, videos: int) -> Tensor:
    """Scales [N, F]: the caller's own, or the guider's between the two ends."""
    if settings.guidance_scales is not None:
        return guiders.given(settings.guidance_scales, videos)
    low, high = settings.min_guidance_scale, settings.max_guidance_scale
    return GUIDERS[settings.guider].scales(low, high, videos, settings.frames)


def noise_video(
    first_latent: Tensor, settings: Settings, generator: Generators, given: Tensor | None
) -> Tensor:
    """Unit-variance noise [N,F,4,h,w]: the caller's own, or drawn as diffusers' `prepare_latents` does."""
    n, *latent = first_latent.shape
    shape = torch.Size((n, settings.frames, *latent))
    if given is None:
        return draw(shape, generator, first_latent.device)
    noise = latents_of("latents", given, shape, first_latent.device)
    if given.is_complex() or not bool(noise.isfinite().all()):
        raise SettingsError(
            "latents",
            expected="finite real numbers",
            got=f"{given.dtype}" if given.is_complex() else "NaN or infinity in them",
            remedy="Draw them with torch.randn.",
        )
    return noise


def latents_of(name: str, given: object, shape: torch.Size, device: torch.device) -> Tensor:
    """A caller's latents as float32 on `device`.  Raises SettingsError unless a tensor of `shape`."""
    if not isinstance(given, Tensor) or given.shape != shape:
        raise SettingsError(
            name,
            expected=f"shape {list(shape)}",
            got=f"{list(given.shape)}" if isinstance(given, Tensor) else f"no tensor: {type(given).__name__}",
            remedy="Pass a tensor [videos, frames, 4, height/8, width/8].",
        )
    return given.to(device, torch.float32)


def denoiser_call(
    stages: Stages,
    steering: Steering,
    time_ids: Tensor,
    embedding: Tensor,
    first_latent: Tensor,
    reusing: Reusing | None = None,
) -> Denoise:
    """D(x; sigma) over all N videos, with the guidance scales that `steering` has at each step.

    time_ids: [N, fields] or [N, F, fields], see `spec.conditioning`.
    """
    batch, network = stages.profile.batch, stages.denoiser

    def run(half: str, **inputs: Tensor) -> Tensor:
        if reusing is not None:
            return reusing(network, batch, half, inputs)
        return in_batches(network, batch, **inputs)["denoised"]

    def begin(x: Tensor, sigma: Tensor, *halves: str) -> None:
        if reusing is not None:
            reusing.begin(x, sigma, halves)

    def batched(x: Tensor, sigma: Tensor) -> Tensor:
        begin(x, sigma, "both")
        return run(
            "both", x=x, sigma=sigma, first_latent=first_latent, embedding=embedding, time_ids=time_ids,
            guidance=steering.scales,
        )  # fmt: skip

    def one_by_one(x: Tensor, sigma: Tensor) -> Tensor:
        """D_u + g (D_c - D_u): guidance commutes with the preconditioning, which is affine in v."""
        begin(x, sigma, "conditional", *(("unconditional",) if steering.guided else ()))
        told = {"x": x, "sigma": sigma, "time_ids": time_ids}

        def conditional_half() -> Tensor:
            return run("conditional", **told, first_latent=first_latent, embedding=embedding)

        if not steering.guided:
            return conditional_half()
        nothing = {"first_latent": torch.zeros_like(first_latent), "embedding": torch.zeros_like(embedding)}
        if stages.other_half is not None:
            conditional, unconditional = stages.other_half.beside(
                conditional_half,
                lambda there, inputs: in_batches(there, batch, **inputs)["denoised"],
                changing={"x": x, "sigma": sigma}, lasting={"time_ids": time_ids, **nothing},
            )  # fmt: skip
        else:
            conditional = conditional_half().clone()  # the next call writes over it
            unconditional = run("unconditional", **told, **nothing)
        scales = steering.scales[:, :, None, None, None]
        return unconditional + scales * (conditional - unconditional)

    return batched if stages.profile.guidance == "batched" else one_by_one


def sample(
    sampler: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: FreshNoise,
    on_step: StepCallback,
    clock: Clock,
    steering: Steering,
    progress: ProgressBar,
    observer: Observer,
) -> Tensor:
    """Noise -> latent video [N,F,4,h,w]; `on_step` may replace the latents after each step.

    An interrupt of `steering` skips the steps that are left: the latents keep the noise of the last one.
    """
    denoised = x  # the latest estimate
    count, done = len(sigmas) - 1, 0
    of = evaluations(sampler, sigmas.tolist())

    with progress(of) as bar:

        def estimate(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal denoised, done
            with clock.evaluation():
                denoised = denoise(x, sigma)
            done += 1
            bar.update()
            observer.on_evaluation(done, of)
            return denoised

        def after(step: int, sigma: Tensor, x: Tensor) -> Tensor:
            clock.end_step()
            observer.on_step(Step(step, count, denoised))
            return on_step(step, c_noise(sigma), x)

        steps = takewhile(lambda _: not steering.interrupted, range(count))
        return SAMPLERS[sampler].sample(estimate, x, sigmas, after, steps, noise)


def decode_video(stages: Stages, latents: Tensor, observer: Observer = UNOBSERVED) -> Tensor:
    """Latents [N,F,4,h,w], already divided by the scale -> frames [N,F,3,H,W] in [0, 1].

    A chunk never spans two videos; diffusers' `decode_latents` mixes them when the chunk does not
    divide the frames.
    """
    profile = stages.profile
    frames = latents.new_empty((*latents.shape[:2], 3, profile.height, profile.width))
    before, count = 0, len(latents) * profile.frames  # frames decoded, and of all videos
    for video, into in zip(latents, frames, strict=True):
        start = 0
        for size in profile.chunks:
            decoder = stages.vae_decoders[size]
            on_part = _told(observer, before, size, count)
            chunk = decoder.call_in_parts(on_part, latent=video[start : start + size])["frames"]  # [T,3,H,W]
            finite(chunk, decoder)
            into[start : start + size] = (chunk / 2 + 0.5).clamp(0, 1)
            start, before = start + size, before + size
    return frames


def _told(observer: Observer, before: int, size: int, frames: int) -> OnPart:
    """Of a run over `size` of so many frames, `before` of which are decoded."""
    return lambda done, parts: observer.on_decoding(before + size * done / parts, frames)


def in_batches(network: Network, batch: int, **inputs: Tensor) -> dict[str, Tensor]:
    """Calls `network`, made for `batch` rows, on any number of rows: its outputs by name.

    Rows do not see each other.

    Inputs without a row dimension (sigma) go into every call.  The last call is filled up with copies
    of the last row.
    """
    rows = max((len(t) for t in inputs.values() if t.dim()), default=batch)
    if rows == batch:
        return network(**inputs)
    parts = []
    for start in range(0, rows, batch):
        index = torch.arange(start, start + batch).clamp(max=rows - 1)
        part = {name: t[index.to(t.device)] if t.dim() else t for name, t in inputs.items()}
        parts.append({name: t[: rows - start].clone() for name, t in network(**part).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def draw(shape: torch.Size, generator: Generators, device: torch.device) -> Tensor:
    """Standard normal noise, as diffusers' `randn_tensor` draws it: same generator, same numbers.

    A list holds one generator for each row; drawn where the generator lives, then moved.
    """
    if isinstance(generator, Sequence):
        if len(generator) == 1:
            return draw(shape, generator[0], device)
        rows = [draw(torch.Size((1, *shape[1:])), g, device) for g in generator[: shape[0]]]
        return torch.cat(rows)
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=torch.float32).to(device)


def finite(tensor: Tensor, network: Network) -> None:
    if not bool(tensor.isfinite().all()):
        bad = int((~tensor.isfinite()).sum())
        raise NonFiniteOutput(
            f"output of {network.spec.network} ({network.placement.backend}, {network.placement.dtype})",
            expected="finite numbers",
            got=f"NaN or infinity in {bad} of {tensor.numel()} values",
            remedy='Use dtype="bf16" or dtype="fp32"; export a bundle in one of these. '
            "`svd-export verify BUNDLE` compares a bundle's networks with eager torch.",
        )
