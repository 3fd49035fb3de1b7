"""EDM preconditioning for v-prediction with sigma_data = 1, in float32.

Karras et al. 2022 (https://arxiv.org/abs/2206.00364), table 1, in the form that SVD was trained for.
sigma is a noise level, float32 [], from sigma_max (700) down to sigma_min.
"""

from __future__ import annotations

from torch import Tensor


def initial_scale(sigmas: Tensor) -> Tensor:
    """Standard deviation of x before the first step, sqrt(sigma_max^2 + 1).  float32 [].

    The data has variance 1, so x = data + sigma * noise has this deviation.  Proof:
    `EulerDiscreteScheduler.init_noise_sigma` for timestep_spacing "leading".
    """
    return (sigmas[0] ** 2 + 1).sqrt()


def c_skip(sigma: Tensor) -> Tensor:
    """Share of x in D(x; sigma)."""
    return 1 / (sigma**2 + 1)


def c_out(sigma: Tensor) -> Tensor:
    """Negative, because the network predicts v = (noise - sigma * data) / sqrt(sigma^2 + 1)."""
    return -sigma / (sigma**2 + 1).sqrt()


def c_in(sigma: Tensor) -> Tensor:
    """Scale x to variance 1 for the network."""
    return 1 / (sigma**2 + 1).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told of the noise level, 0.25 ln sigma."""
    return 0.25 * sigma.log()
