"""Schedules: the noise levels of a call, float32 [steps + 1], falling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from svd_engine.values import at_least, noise_levels

Schedule = Callable[[int, float, float, float], Tensor]  # (steps, sigma_min, sigma_max, rho) -> [steps + 1]


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max .. sigma_min, then 0.  Karras et al. 2022, eq. 5.

    Raises SettingsError for steps < 1.
    """
    ramp = torch.linspace(0, 1, at_least("num_inference_steps", steps, 1), dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def given(sigmas: Sequence[float]) -> Tensor:
    """A caller's own noise levels, the last one included.

    As `EulerDiscreteScheduler.set_timesteps(sigmas=...)` takes them: n + 1 levels make n steps.
    Raises SettingsError unless they fall strictly, are finite, positive, and end at 0 or above.
    """
    return torch.tensor(noise_levels(sigmas), dtype=torch.float32)
