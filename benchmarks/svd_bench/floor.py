"""The limit: rates that this machine reaches on plain operations, and the work that a network asks for.

Work is counted over the networks as diffusers publishes them, so every subject is divided by the same
number; a rewrite that saves work shows as a higher share, of useful work as in "model FLOP utilisation".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from svd_bench.harness import Timer
from svd_bench.results import Ceiling, Setting
from svd_engine.checkpoint.configs import Configs
from svd_engine.checkpoint.weights import build
from svd_engine.networks.modules import COMPONENT_OF, wrap
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec

LAPS = 5
CALLS = {"cuda": 10, "cpu": 1}  # per lap: one product on a GPU is over in a millisecond
SIDES = {"cuda": (4096, 8192), "cpu": (1024, 2048)}  # of square matrices
# Channels, images, height, width of 3x3 convolutions: shapes of SVD's UNet and of its VAE decoder.
IMAGES = {"cuda": ((320, 28, 72, 128), (512, 14, 144, 256)), "cpu": ((320, 8, 32, 64), (512, 2, 64, 64))}
COPIED = {"cuda": 2**31, "cpu": 2**28}  # bytes


def measure_ceiling(device: torch.device, dtypes: Iterable[str], timer: Timer, scale: int = 1) -> Ceiling:
    """The best lap of each kind, over a few shapes and both memory layouts, on random data.

    `scale` divides the sizes, for tests.  Rates are FLOP/s by element type and bytes/s, read and written.
    """
    kinds = list(dict.fromkeys(dtypes))
    return Ceiling(
        matmul_flops={name: _matmul(device, _dtype(name), timer, scale) for name in kinds},
        conv_flops={name: _conv(device, _dtype(name), timer, scale) for name in kinds},
        copy_bytes=_copy(device, timer, scale),
    )


def best_rate(ceiling: Ceiling, dtype: str) -> float:
    """FLOP/s: the higher of the two, because what convolves at a rate can multiply at it."""
    return max(ceiling.matmul_flops[dtype], ceiling.conv_flops[dtype])


def share(ceiling: Ceiling, dtype: str, flop: float | None, ms: float) -> float | None:
    """Of the limit that `flop` in `ms` milliseconds reaches."""
    return None if flop is None else flop / (ms / 1e3) / best_rate(ceiling, dtype)


def stage_flop(stage: str, setting: Setting, architecture: Architecture, configs: Configs) -> float | None:
    """FLOP of one call of a stage, of the whole video for whole_video; None for a stage without networks."""
    profile = profile_of(setting)
    image, encoder, denoiser, *decoders = specs_of(profile, architecture, FLOAT32)  # of any precision
    if stage == "whole_video":
        by_frames = {spec.inputs[0].shape[0]: network_flop(spec, configs) for spec in decoders}
        once = network_flop(image, configs) + network_flop(encoder, configs)
        calls = setting.steps * (2 if setting.guidance == "single" else 1)
        steps = calls * network_flop(denoiser, configs)
        return once + steps + setting.batch * sum(by_frames[frames] for frames in profile.chunks)
    by_stage = {
        "image_encoder": image,
        "vae_encoder": encoder,
        "denoiser_step": denoiser,
        "vae_decoder": decoders[0],
    }
    return network_flop(by_stage[stage], configs) if stage in by_stage else None


def network_flop(spec: NetworkSpec, configs: Configs) -> float:
    """FLOP of one call: matrix products, convolutions and attention, 2 per multiply-add.  Runs nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    component = COMPONENT_OF[spec.network]
    module = wrap(spec, build(component, configs[component])).to("meta").eval()
    inputs = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in spec.inputs}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**inputs)
    return float(counter.get_total_flops())


def profile_of(setting: Setting) -> Profile:
    return Profile(
        setting.frames, setting.height, setting.width, setting.batch, setting.guidance, setting.decode_chunk
    )


def _matmul(device: torch.device, dtype: torch.dtype, timer: Timer, scale: int) -> float:
    def rate(side: int) -> float:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        return 2 * side**3 / _seconds(lambda: a @ b, device, timer)

    return max(rate(side // scale) for side in SIDES[device.type])


def _conv(device: torch.device, dtype: torch.dtype, timer: Timer, scale: int) -> float:
    def rate(shape: tuple[int, ...], layout: torch.memory_format) -> float:
        channels, images, height, width = shape
        x = torch.randn(images, channels, height // scale, width // scale, device=device).to(dtype)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
        x, weight = x.to(memory_format=layout), weight.to(memory_format=layout)
        flop = 2 * 9 * channels * x.numel()
        return flop / _seconds(lambda: F.conv2d(x, weight, padding=1), device, timer)

    layouts = (torch.contiguous_format, torch.channels_last)
    return max(rate(shape, layout) for shape in IMAGES[device.type] for layout in layouts)


def _copy(device: torch.device, timer: Timer, scale: int) -> float:
    source = torch.rand(COPIED[device.type] // 4 // scale, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device, timer)


def _seconds(call: Callable[[], Tensor], device: torch.device, timer: Timer) -> float:
    """Of one call, in the best lap after two that warm up."""

    def calls() -> None:
        for _ in range(CALLS[device.type]):
            call()

    with torch.no_grad():
        laps = [timer.lap(calls)[0].ms for _ in range(LAPS + 2)]
    return min(laps[2:]) / 1e3 / CALLS[device.type]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
