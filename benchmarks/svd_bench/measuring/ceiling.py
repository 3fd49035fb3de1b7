"""The ceiling: rates that this machine reaches on plain operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from svd_bench.documents.results import Ceiling
from svd_bench.measuring.timing import Timer

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
