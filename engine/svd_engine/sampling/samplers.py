"""Samplers: loops from noise to data over any denoiser D(x; sigma).

Each is the discretisation of one equation, dx/dsigma = (x - D(x; sigma)) / sigma, of Karras et al. 2022
(https://arxiv.org/abs/2206.00364), with or without fresh noise.  s and t stand for the noise levels at the
two ends of a step.  A denoiser may write its next answer over the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log, prod, sqrt
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", "Tensor"], "Tensor"]  # (x, sigma) -> D(x; sigma), of x's shape
OnStep = Callable[[int, "Tensor", "Tensor"], "Tensor"]  # (step, its sigma, x after it) -> x of the next step


def unchanged(_step: int, _sigma: Tensor, x: Tensor) -> Tensor:
    return x


def drawn_like(x: Tensor) -> Tensor:
    """Standard normal noise of torch's global generator."""
    return x.new_empty(x.shape).normal_()


@dataclass(frozen=True)
class FreshNoise:
    """The noise that a sampler adds on its way."""

    draw: Callable[[Tensor], Tensor] = drawn_like  # x -> noise of variance 1, of x's shape
    churn: float = 0.0  # S_churn of Karras et al., of `euler` and `heun`


TORCH_NOISE = FreshNoise()


class Sampler(Protocol):
    """Takes x from sigmas[0] to sigmas[-1], any shape, and gives the last x.

    sigmas: [steps + 1], strictly falling to 0 or above.  steps: numbers of the steps to take, in order; a
    caller that stops early shortens it.  None takes all.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        on_step: OnStep = ...,
        steps: Iterable[int] | None = None,
        noise: FreshNoise = ...,
        /,
    ) -> Tensor: ...


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,  # [steps + 1]
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """Karras et al. 2022, algorithm 2 without the second-order correction: one denoiser call a step."""
    count = len(sigmas) - 1
    for step in range(count) if steps is None else steps:
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        x, raised = churned(x, sigma, count, noise)
        slope = (x - denoise(x, raised)) / raised
        x = on_step(step, sigma, x + (sigma_next - raised) * slope)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """Karras et al. 2022, algorithm 2: the mean of the slopes at both ends.  Second order.

    A step to noise level 0, where there is no slope, is `euler`'s.
    """
    count = len(sigmas) - 1
    for step, _, t in intervals(sigmas, steps):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        x, raised = churned(x, sigma, count, noise)
        slope = (x - denoise(x, raised)) / raised
        end = x + (sigma_next - raised) * slope
        if t > 0:
            slope = (slope + (end - denoise(end, sigma_next)) / sigma_next) / 2
            end = x + (sigma_next - raised) * slope
        x = on_step(step, sigma, end)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """Euler steps that go further down, and fresh noise up to the next level (k-diffusion, eta = 1)."""
    for step, s, t in intervals(sigmas, steps):
        slope = (x - denoise(x, sigmas[step])) / s
        down, up = ancestral_levels(s, t)
        x = x + (down - s) * slope
        x = on_step(step, sigmas[step], x + up * noise.draw(x) if up else x)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    _noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (https://arxiv.org/abs/2211.01095), algorithm 2.  Second order.

    D is extrapolated from the last two calls, linearly in log sigma.  The first step, and one to noise
    level 0, has no extrapolation.
    """
    earlier: tuple[float, Tensor] | None = None  # noise level and D of the step before
    for step, s, t in intervals(sigmas, steps):
        denoised = denoise(x, sigmas[step]).clone()
        target = denoised
        if earlier is not None and t > 0:
            level, before = earlier
            target = denoised + log(s / t) / log(level / s) / 2 * (denoised - before)
        earlier = s, denoised
        x = on_step(step, sigmas[step], towards(target, x, t / s))
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """DPM-Solver++(2S), algorithm 1 of the same paper, with fresh noise as `euler_ancestral` adds it.

    Its second call is at the middle of the step in log sigma: sqrt(s t^2 / s) = t, the next level.
    A step to noise level 0 lands on D.
    """
    for step, s, t in intervals(sigmas, steps):
        target = denoise(x, sigmas[step])
        if t > 0:
            target = denoise(towards(target, x, t / s), sigmas[step + 1])
        down, up = ancestral_levels(s, t)
        x = towards(target, x, down / s)
        x = on_step(step, sigmas[step], x + up * noise.draw(x) if up else x)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    _noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """Linear multistep: integrates the cubic through the last four slopes (k-diffusion, order 4)."""
    levels: list[float] = []  # of the last steps, the newest first
    slopes: list[Tensor] = []
    for step, s, t in intervals(sigmas, steps):
        levels = [s, *levels[:3]]
        slopes = [(x - denoise(x, sigmas[step])) / s, *slopes[:3]]
        for weight, slope in zip(adams_bashforth(levels, t), slopes, strict=True):
            x = x + weight * slope
        x = on_step(step, sigmas[step], x)
    return x


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
    noise: FreshNoise = TORCH_NOISE,
) -> Tensor:
    """Multistep sampling of consistency models, Song et al. 2023 (https://arxiv.org/abs/2303.01469).

    Lands on D and goes back up to the next level.  For networks trained for it, as AnimateLCM-SVD is.
    """
    for step, _, t in intervals(sigmas, steps):
        x = denoise(x, sigmas[step]).clone()
        x = on_step(step, sigmas[step], x + t * noise.draw(x) if t else x)
    return x


def intervals(sigmas: Tensor, steps: Iterable[int] | None) -> Iterator[tuple[int, float, float]]:
    """Number of each step and the noise levels at its two ends.  Reads from a GPU once."""
    levels = sigmas.tolist()
    for step in range(len(levels) - 1) if steps is None else steps:
        yield step, levels[step], levels[step + 1]


def churned(x: Tensor, sigma: Tensor, steps: int, noise: FreshNoise) -> tuple[Tensor, Tensor]:
    """x with the noise that Karras et al.'s S_churn adds, and its higher noise level; S_noise is 1."""
    gamma = min(noise.churn / steps, sqrt(2) - 1)
    if gamma == 0:
        return x, sigma
    return x + sigma * sqrt(gamma * (gamma + 2)) * noise.draw(x), sigma * (1 + gamma)


def ancestral_levels(s: float, t: float) -> tuple[float, float]:
    """Level to go down to, and deviation of the noise that brings it up to t: down^2 + up^2 = t^2."""
    return t * t / s, t * sqrt(1 - (t / s) ** 2)


def towards(denoised: Tensor, x: Tensor, share: float) -> Tensor:
    """From x to `denoised`, `share` of x left: the exact step if D were constant.  A new tensor."""
    return share * x + (1 - share) * denoised


def adams_bashforth(levels: Sequence[float], end: float) -> list[float]:
    """Integrals from levels[0] to `end` of the Lagrange polynomials through one to four levels.

    By Gauss's quadrature with two nodes, which is exact to degree three.
    """
    middle, half = (end + levels[0]) / 2, (end - levels[0]) / 2
    nodes = (middle - half / sqrt(3), middle + half / sqrt(3))
    return [
        half
        * sum(prod((node - other) / (level - other) for other in levels if other != level) for node in nodes)
        for level in levels
    ]
