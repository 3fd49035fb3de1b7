"""Noise levels, EDM scalings and the sampler, as pure functions.  Knows no images, networks or guidance.

Karras et al. 2022 (https://arxiv.org/abs/2206.00364), in the form that SVD was trained for: v-prediction
with sigma_data = 1.  All of it is float32 arithmetic; sigma runs from sigma_max (700) down to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from svd_engine.errors import SettingsError


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max .. sigma_min, then 0.  float32 [steps + 1].  Karras et al. 2022, eq. 5.

    Raises SettingsError for steps < 1.
    """
    if steps < 1:
        raise SettingsError(
            "num_inference_steps", expected="at least 1", got=str(steps), remedy="Ask for one step or more."
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def given_sigmas(sigmas: Sequence[float]) -> Tensor:
    """A caller's own noise levels, the last one included.  float32 [steps + 1].

    As `EulerDiscreteScheduler.set_timesteps(sigmas=...)` takes them: n + 1 levels make n steps.
    Raises SettingsError unless they fall strictly, are finite, positive, and end at 0 or above.
    """
    levels = torch.tensor(list(sigmas), dtype=torch.float32)
    falls = len(levels) >= 2 and bool((levels[:-1] > levels[1:]).all())
    if not (falls and bool(levels.isfinite().all()) and levels[-1] >= 0):
        raise SettingsError(
            "sigmas",
            expected="two or more finite noise levels that fall strictly and end at 0 or above",
            got=str(list(sigmas)),
            remedy="For n steps pass n + 1 levels, the last usually 0.0.",
        )
    return levels


def initial_scale(sigmas: Tensor) -> Tensor:
    """Standard deviation of x before the first step, sqrt(sigma_max^2 + 1).  float32 [].

    The data has variance 1, so x = data + sigma * noise has this deviation.  Proof:
    `EulerDiscreteScheduler.init_noise_sigma` for timestep_spacing "leading".
    """
    return (sigmas[0] ** 2 + 1).sqrt()


def c_skip(sigma: Tensor) -> Tensor:
    """Karras et al. 2022, table 1 with sigma_data = 1, as the three functions below."""
    return 1 / (sigma**2 + 1)


def c_out(sigma: Tensor) -> Tensor:
    """Negative, because the network predicts v = (noise - sigma * data) / sqrt(sigma^2 + 1)."""
    return -sigma / (sigma**2 + 1).sqrt()


def c_in(sigma: Tensor) -> Tensor:
    return 1 / (sigma**2 + 1).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told of the noise level, 0.25 ln sigma."""
    return 0.25 * sigma.log()


def euler_steps(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigmas: Tensor
) -> Generator[tuple[Tensor, Tensor], Tensor | None, None]:
    """Karras et al. 2022, algorithm 2 without churn: yields (sigma, x after its step), once a step.

    denoise(x, sigma) gives D(x; sigma).  Whatever the consumer sends back replaces x, so that a
    caller's callback can edit the latents between steps.
    """
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        x = x + (sigma_next - sigma) * slope
        replaced = yield sigma, x
        x = x if replaced is None else replaced
