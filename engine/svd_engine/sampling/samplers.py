"""Samplers: loops from noise to data over any denoiser D(x; sigma)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> D(x; sigma), of x's shape
OnStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, its sigma, x after it) -> x of the next step


def unchanged(_step: int, _sigma: Tensor, x: Tensor) -> Tensor:
    return x


class Sampler(Protocol):
    """Takes x from sigmas[0] to sigmas[-1], any shape, and gives the last x.

    steps: numbers of the steps to take, in order; a caller that stops early shortens it.  None takes all.
    """

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        on_step: OnStep = unchanged,
        steps: Iterable[int] | None = None,
    ) -> Tensor: ...


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,  # [steps + 1]
    on_step: OnStep = unchanged,
    steps: Iterable[int] | None = None,
) -> Tensor:
    """Karras et al. 2022, algorithm 2 without churn and second-order correction: one denoiser call a step."""
    for step in range(len(sigmas) - 1) if steps is None else steps:
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        slope = (x - denoise(x, sigma)) / sigma
        x = on_step(step, sigma, x + (sigma_next - sigma) * slope)
    return x
