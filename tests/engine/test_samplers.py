"""Samplers against the formulas of k-diffusion and sgm, on data whose denoiser is known in closed form.

The references say each step as those sources do, in t = -log sigma, with exponentials and quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log2
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from svd_engine.sampling import samplers, schedules
from svd_engine.sampling.registry import SAMPLERS, evaluations
from svd_engine.sampling.samplers import Denoise, FreshNoise

Reference = Callable[[Denoise, Tensor, list[float], Iterator[Tensor]], Tensor]
ENDS_AT_ZERO = schedules.karras(9, 0.002, 700.0)
ENDS_ABOVE = schedules.given([40.0, 11.0, 6.5, 2.0, 0.9, 0.3])
MEAN = torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(2, 3, 4)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; sigma) of data with mean MEAN and variance 1."""
    return (x + sigma**2 * MEAN.to(x.dtype)) / (1 + sigma**2)


def two_points(x: Tensor, sigma: Tensor) -> Tensor:
    """D(x; sigma) of data that is 1 or -1."""
    return torch.tanh(x / sigma**2)


# References


def derivative(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    return (x - denoised) / sigma


def at(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    return denoise(x, torch.tensor(sigma, dtype=x.dtype))


def churned(
    x: Tensor, sigma: float, steps: int, churn: float, noise: Iterator[Tensor]
) -> tuple[Tensor, float]:
    gamma = min(churn / steps, 2**0.5 - 1)
    raised = sigma * (gamma + 1)
    return (x + next(noise) * (raised**2 - sigma**2) ** 0.5 if gamma else x), raised


def euler_edm(churn: float) -> Reference:
    def run(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Iterator[Tensor]) -> Tensor:
        for i in range(len(sigmas) - 1):
            x, raised = churned(x, sigmas[i], len(sigmas) - 1, churn, noise)
            d = derivative(x, raised, at(denoise, x, raised))
            x = x + d * (sigmas[i + 1] - raised)
        return x

    return run


def heun_edm(churn: float) -> Reference:
    def run(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Iterator[Tensor]) -> Tensor:
        for i in range(len(sigmas) - 1):
            x, raised = churned(x, sigmas[i], len(sigmas) - 1, churn, noise)
            d = derivative(x, raised, at(denoise, x, raised))
            dt = sigmas[i + 1] - raised
            if sigmas[i + 1] == 0:
                x = x + d * dt
            else:
                x_2 = x + d * dt
                d_2 = derivative(x_2, sigmas[i + 1], at(denoise, x_2, sigmas[i + 1]))
                x = x + (d + d_2) / 2 * dt
        return x

    return run


def ancestral_step(sigma: float, sigma_next: float) -> tuple[float, float]:
    up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
    return (sigma_next**2 - up**2) ** 0.5, up


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Iterator[Tensor]) -> Tensor:
    for i in range(len(sigmas) - 1):
        down, up = ancestral_step(sigmas[i], sigmas[i + 1])
        x = x + derivative(x, sigmas[i], at(denoise, x, sigmas[i])) * (down - sigmas[i])
        if sigmas[i + 1] > 0:
            x = x + next(noise) * up
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float], _: Iterator[Tensor]) -> Tensor:
    old = None
    with np.errstate(divide="ignore"):
        t = -np.log(np.array(sigmas))
    for i in range(len(sigmas) - 1):
        denoised = at(denoise, x, sigmas[i])
        h = t[i + 1] - t[i]
        target = denoised
        if old is not None and sigmas[i + 1] > 0:
            r = (t[i] - t[i - 1]) / h
            target = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * old
        x = float(np.exp(-t[i + 1]) / np.exp(-t[i])) * x - float(np.expm1(-h)) * target
        old = denoised
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Iterator[Tensor]) -> Tensor:
    for i in range(len(sigmas) - 1):
        denoised = at(denoise, x, sigmas[i])
        down, up = ancestral_step(sigmas[i], sigmas[i + 1])
        if down == 0:
            x = x + derivative(x, sigmas[i], denoised) * (down - sigmas[i])
            continue
        t, t_next = -np.log(sigmas[i]), -np.log(down)
        h = t_next - t
        middle = float(np.exp(-(t + h / 2)))
        x_2 = middle / sigmas[i] * x - float(np.expm1(-h / 2)) * denoised
        x = down / sigmas[i] * x - float(np.expm1(-h)) * at(denoise, x_2, middle)
        x = x + next(noise) * up
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: list[float], _: Iterator[Tensor]) -> Tensor:
    ds: list[Tensor] = []
    for i in range(len(sigmas) - 1):
        ds.append(derivative(x, sigmas[i], at(denoise, x, sigmas[i])))
        order = min(i + 1, 4)
        for j in range(order):
            basis = np.polynomial.Polynomial([1.0])
            for k in set(range(order)) - {j}:
                factor = np.polynomial.Polynomial([-sigmas[i - k], 1.0])
                basis = basis * factor / (sigmas[i - j] - sigmas[i - k])
            integral = basis.integ()
            x = x + float(integral(sigmas[i + 1]) - integral(sigmas[i])) * ds[-1 - j]
    return x


def animate_lcm(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Iterator[Tensor]) -> Tensor:
    for i in range(len(sigmas) - 1):
        x = at(denoise, x, sigmas[i])
        if sigmas[i + 1] > 0:  # the reference adds noise of deviation 0 as well
            x = x + sigmas[i + 1] * next(noise)
    return x


CASES: dict[str, tuple[str, float, Reference]] = {
    "euler": ("euler", 0, euler_edm(0)),
    "euler, churned": ("euler", 2, euler_edm(2)),
    "euler, churned to the limit": ("euler", 50, euler_edm(50)),
    "heun": ("heun", 0, heun_edm(0)),
    "heun, churned": ("heun", 2, heun_edm(2)),
    "euler-ancestral": ("euler-ancestral", 0, euler_ancestral),
    "dpmpp-2m": ("dpmpp-2m", 0, dpmpp_2m),
    "dpmpp-2s-ancestral": ("dpmpp-2s-ancestral", 0, dpmpp_2s_ancestral),
    "lms": ("lms", 0, lms),
    "lcm": ("lcm", 0, animate_lcm),
}


def draws(dtype: torch.dtype, seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(MEAN.shape, generator=generator, dtype=dtype)


def start(sigmas: Tensor) -> Tensor:
    return next(draws(sigmas.dtype, 0)) * (sigmas[0] ** 2 + 1).sqrt()


def test_every_sampler_has_a_reference() -> None:
    assert {name for name, *_ in CASES.values()} == set(SAMPLERS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("sigmas", [ENDS_AT_ZERO, ENDS_ABOVE], ids=["to zero", "above zero"])
@pytest.mark.parametrize("denoise", [gaussian, two_points])
@pytest.mark.parametrize("case", CASES)
def test_equals_its_reference(
    case: str, denoise: Denoise, sigmas: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    """The same video for the same draws, of which it takes no more and no fewer.

    In float32 the noisy values are hundreds, so tolerance is of the larger of a value and 1.
    """
    name, churn, reference = CASES[case]
    levels = sigmas.to(dtype)
    ours, theirs = draws(dtype), draws(dtype)
    got = SAMPLERS[name].sample(
        denoise, start(levels), levels, samplers.unchanged, None, FreshNoise(lambda x: next(ours), churn)
    )
    expected = reference(denoise, start(levels), levels.tolist(), theirs)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(next(ours), next(theirs))
    assert got.dtype == dtype


# How fast they converge


def error(name: str, steps: int) -> float:
    """Against the exact solution: x - mean grows as sqrt(1 + sigma^2)."""
    sigmas = torch.logspace(1, -1, steps + 1, dtype=torch.float64)
    x = start(sigmas)
    exact = MEAN + (x - MEAN) * ((1 + sigmas[-1] ** 2) / (1 + sigmas[0] ** 2)).sqrt()
    return float((SAMPLERS[name].sample(gaussian, x, sigmas) - exact).abs().max())


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp-2m", 2), ("lms", 2)])
def test_the_error_falls_with_the_order(name: str, order: int) -> None:
    """Twice the steps: half the error of first order, a quarter of second (lms starts with an Euler step)."""
    falls = [log2(error(name, steps) / error(name, 2 * steps)) for steps in (32, 64)]
    assert order - 0.2 < min(falls)
    assert name == "lms" or max(falls) < order + 0.3


def test_the_second_order_is_better_for_the_same_evaluations() -> None:
    euler = error("euler", 32)
    assert error("heun", 16) < euler / 3
    assert error("dpmpp-2m", 32) < euler / 3
    assert error("lms", 32) < euler / 3


# What every sampler keeps to


@pytest.mark.parametrize("sigmas", [ENDS_AT_ZERO, ENDS_ABOVE], ids=["to zero", "above zero"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_those_that_are_counted(name: str, sigmas: Tensor) -> None:
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == ()
        seen.append(float(sigma))
        return gaussian(x, sigma)

    SAMPLERS[name].sample(denoise, start(sigmas), sigmas)
    assert len(seen) == evaluations(name, sigmas.tolist())
    assert (
        len(seen)
        == {1: len(sigmas) - 1, 2: sum(2 if s > 0 else 1 for s in sigmas[1:])}[SAMPLERS[name].evaluations]
    )
    assert min(seen) > 0


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_sees_every_step_and_replaces_x(name: str) -> None:
    seen: list[tuple[int, float]] = []

    def on_step(step: int, sigma: Tensor, x: Tensor) -> Tensor:
        seen.append((step, float(sigma)))
        return torch.full_like(x, 7.5) if step == 7 else x

    x = SAMPLERS[name].sample(lambda x, sigma: x, start(ENDS_AT_ZERO), ENDS_AT_ZERO, on_step)
    assert seen == [(step, float(sigma)) for step, sigma in enumerate(ENDS_AT_ZERO[:-1])]
    assert len(x.unique()) <= (1 if name in ("euler", "heun", "lcm", "dpmpp-2s-ancestral") else x.numel())


@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_that_are_not_taken_leave_the_noise(name: str) -> None:
    """A caller that stops early gets what the sampler has along levels cut off there."""
    whole, cut = ENDS_ABOVE, ENDS_ABOVE[:4]
    ours, theirs = draws(torch.float32), draws(torch.float32)
    sample = SAMPLERS[name].sample
    stopped = sample(
        gaussian, start(whole), whole, samplers.unchanged, range(3), FreshNoise(lambda x: next(ours))
    )
    expected = sample(gaussian, start(cut), cut, samplers.unchanged, None, FreshNoise(lambda x: next(theirs)))
    assert torch.equal(stopped, expected)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_may_write_over_its_last_answer(name: str) -> None:
    """As runtimes with one output buffer do.  What comes out is the caller's own."""
    buffer = torch.empty(MEAN.shape)

    def overwriting(x: Tensor, sigma: Tensor) -> Tensor:
        return buffer.copy_(gaussian(x, sigma))

    results = []
    for denoise in (gaussian, overwriting):
        noise = draws(torch.float32)
        results.append(
            SAMPLERS[name].sample(
                denoise, start(ENDS_AT_ZERO), ENDS_AT_ZERO, samplers.unchanged, None,
                FreshNoise(lambda x, noise=noise: next(noise)),  # type: ignore[misc]
            )
        )  # fmt: skip
    expected, got = results
    buffer.fill_(torch.nan)
    assert torch.equal(got, expected)


def test_without_a_source_noise_is_torch_s() -> None:
    runs: list[Any] = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(samplers.lcm(gaussian, start(ENDS_ABOVE), ENDS_ABOVE))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
