"""Noise levels, scalings and the Euler step against diffusers' EulerDiscreteScheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from svd_engine.errors import SettingsError
from svd_engine.sampling import guiders, preconditioning, samplers, schedules


def scheduler(**change: Any) -> Any:
    """SVD's own, as in its scheduler_config.json."""
    from diffusers import EulerDiscreteScheduler

    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
    }
    return EulerDiscreteScheduler(**{**config, **change})


@pytest.mark.parametrize("steps", [1, 2, 4, 25, 50])
def test_the_schedule_is_diffusers(steps: int) -> None:
    reference = scheduler()
    reference.set_timesteps(steps)
    sigmas = schedules.karras(steps, 0.002, 700.0)
    torch.testing.assert_close(sigmas, reference.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        preconditioning.c_noise(sigmas[:-1]), reference.timesteps, rtol=1e-6, atol=1e-6
    )
    assert float(preconditioning.initial_scale(sigmas)) == pytest.approx(
        float(reference.init_noise_sigma), rel=1e-7
    )


def test_a_step_is_diffusers_step() -> None:
    """With v from any network: c_in before it, c_out and c_skip after it, then Euler."""
    reference, levels = scheduler(), [9.0, 2.5, 0.3, 0.0]
    reference.set_timesteps(sigmas=levels)
    sigmas = schedules.given(levels)
    x = torch.randn(
        2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)
    ) * preconditioning.initial_scale(sigmas)

    def network(scaled: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * scaled + noise)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        v = network(x * preconditioning.c_in(sigma), preconditioning.c_noise(sigma))
        return v * preconditioning.c_out(sigma) + x * preconditioning.c_skip(sigma)

    theirs = x
    for t in reference.timesteps:
        v = network(reference.scale_model_input(theirs, t), t)
        theirs = reference.step(v, t, theirs).prev_sample
    ours = samplers.euler(denoise, x, sigmas)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_a_perfect_denoiser_is_reached() -> None:
    """If D is the data itself, the last step lands on it: sigma 0 leaves no noise."""
    data = torch.full((1, 2, 4, 3, 3), 0.25)
    sigmas = schedules.karras(7, 0.002, 700.0)
    x = samplers.euler(lambda x, sigma: data, torch.randn_like(data) * 700, sigmas)
    torch.testing.assert_close(x, data, rtol=0, atol=1e-4)


def test_a_callback_sees_every_step_and_replaces_x() -> None:
    seen: list[tuple[int, float, float]] = []

    def on_step(step: int, sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append((step, float(sigma), float(x)))
        return x + 7.5 if step == 0 else x

    x = samplers.euler(lambda x, sigma: x * 0, torch.ones(1), schedules.given([2.0, 1.0, 0.5]), on_step)
    assert seen == [(0, 2.0, 0.5), (1, 1.0, 4.0)]
    assert float(x) == 4.0


def test_a_sampler_takes_the_steps_that_it_is_given() -> None:
    sigmas = schedules.given([2.0, 1.0, 0.5])
    for steps, last in (([], 1.0), ([0], 0.5), ([0, 1], 0.25)):
        assert float(samplers.euler(lambda x, sigma: x * 0, torch.ones(1), sigmas, steps=steps)) == last


def test_guidance_grows_from_the_first_frame_to_the_last() -> None:
    assert guiders.linear(1, 3, 2, 5).tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0]] * 2


def test_no_steps_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"num_inference_steps: expected a whole number of at least 1, got 0"
    ):
        schedules.karras(0, 0.002, 700.0)


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], [1.0, 2.0], [2.0, 2.0, 0.0], [2.0, math.nan, 0.0], [math.inf, 1.0, 0.0], [1.0, -0.5]],
    ids=str,
)
def test_impossible_noise_levels_are_refused(levels: list[float]) -> None:
    with pytest.raises(SettingsError, match=r"sigmas: expected two or more .* got .* pass n \+ 1 levels"):
        schedules.given(levels)
