"""Schedules: the noise levels of a call, float32 [steps + 1], falling to 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from svd_engine.errors import SettingsError
from svd_engine.values import at_least, noise_levels

if TYPE_CHECKING:
    from torch import Tensor

Schedule = Callable[[int, float, float, float], "Tensor"]  # (steps, sigma_min, sigma_max, rho) -> [steps + 1]

# "Align Your Steps", Sabour et al. 2024 (https://arxiv.org/abs/2404.14507): SVD in ten steps
ALIGNED = (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034)
LCM_LEVELS = 40  # that AnimateLCM-SVD was distilled on


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max .. sigma_min, then 0.  Karras et al. 2022, eq. 5.

    Raises SettingsError for steps < 1.
    """
    import torch

    ramp = torch.linspace(0, 1, at_least("num_inference_steps", steps, 1), dtype=torch.float64)
    return _ending_at_zero(_karras(ramp, sigma_min, sigma_max, rho))


def exponential(steps: int, sigma_min: float, sigma_max: float, _rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max .. sigma_min, each the same share of the one before, then 0 (k-diffusion).

    Raises SettingsError for steps < 1.
    """
    import torch

    ramp = torch.linspace(0, 1, at_least("num_inference_steps", steps, 1), dtype=torch.float64)
    return _ending_at_zero(sigma_max * (sigma_min / sigma_max) ** ramp)


def ays(steps: int, sigma_min: float, sigma_max: float, _rho: float = 7.0) -> Tensor:
    """The levels of "Align Your Steps" for SVD; other counts than ten lie between them, linear in log sigma.

    Raises SettingsError for steps < 1, and for other noise levels than SVD's, whose ends are in the table.
    """
    import numpy as np
    import torch

    at_least("num_inference_steps", steps, 1)
    if (sigma_min, sigma_max) != (0.002, 700.0):
        raise SettingsError(
            'schedule "ays"',
            expected="a model with SVD's noise levels, 0.002 to 700",
            got=f"{sigma_min:g} to {sigma_max:g}",
            remedy='Use schedule="karras", or pass sigmas of your own.',
        )
    table = np.log([*ALIGNED, sigma_min])  # its last level stands for 0 while one interpolates
    places = np.linspace(0, len(ALIGNED), steps + 1)[:-1]
    return _ending_at_zero(torch.from_numpy(np.exp(np.interp(places, range(len(table)), table))))


def lcm(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Every (40 // steps)th of forty Karras levels, from sigma_max on, then 0: AnimateLCM-SVD's scheduler.

    Raises SettingsError unless steps are 1 to 40.
    """
    import torch

    if at_least("num_inference_steps", steps, 1) > LCM_LEVELS:
        raise SettingsError(
            "num_inference_steps",
            expected=f'1 to {LCM_LEVELS} with schedule "lcm"',
            got=str(steps),
            remedy="Take 4 to 8 steps, as the networks that this schedule is for do.",
        )
    ramp = torch.arange(steps, dtype=torch.float64) * (LCM_LEVELS // steps) / (LCM_LEVELS - 1)
    return _ending_at_zero(_karras(ramp, sigma_min, sigma_max, rho))


def given(sigmas: Sequence[float]) -> Tensor:
    """A caller's own noise levels, the last one included.

    As `EulerDiscreteScheduler.set_timesteps(sigmas=...)` takes them: n + 1 levels make n steps.
    Raises SettingsError unless they fall strictly, are finite, positive, and end at 0 or above.
    """
    import torch

    return torch.tensor(noise_levels(sigmas), dtype=torch.float32)


def _karras(ramp: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels: Tensor = (high + ramp * (low - high)) ** rho
    return levels


def _ending_at_zero(levels: Tensor) -> Tensor:
    import torch

    return torch.cat([levels, levels.new_zeros(1)]).float()
