"""Schedules, guiders, scalings and the Euler step against diffusers, sgm and AnimateLCM.

Samplers against their formulas: `test_samplers.py`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from svd_engine.errors import SettingsError
from svd_engine.sampling import guiders, preconditioning, samplers, schedules
from svd_engine.sampling.registry import GUIDERS, SCHEDULES


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


def test_rho_bends_the_karras_schedule() -> None:
    """At rho 1 the levels are equally far apart."""
    torch.testing.assert_close(
        schedules.karras(4, 1.0, 10.0, 1.0), torch.tensor([10.0, 7, 4, 1, 0]), rtol=1e-6, atol=0
    )


def test_the_exponential_schedule_is_k_diffusion_s() -> None:
    """Equal steps between the logarithms of its ends."""
    expected = torch.linspace(math.log(700), math.log(0.002), 6, dtype=torch.float64).exp().float()
    sigmas = schedules.exponential(6, 0.002, 700.0)
    torch.testing.assert_close(sigmas[:-1], expected, rtol=1e-6, atol=0)
    assert float(sigmas[-1]) == 0


def test_ten_aligned_steps_are_diffusers_table() -> None:
    from diffusers.schedulers import AysSchedules

    expected = torch.tensor(AysSchedules["StableDiffusionVideoSigmas"])
    assert torch.equal(schedules.ays(10, 0.002, 700.0), expected)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 25])
def test_other_counts_of_aligned_steps_lie_between(steps: int) -> None:
    """Linear in log sigma, with 0.002 in the place of the last 0 while one interpolates."""
    sigmas = schedules.ays(steps, 0.002, 700.0)
    assert (len(sigmas), float(sigmas[0]), float(sigmas[-1])) == (steps + 1, 700.0, 0.0)
    table = [*schedules.ALIGNED, 0.002]
    for place, sigma in zip(torch.linspace(0, 10, steps + 1, dtype=torch.float64), sigmas[:-1], strict=False):
        below = min(int(place), 9)
        share = float(place) - below
        expected = table[below] ** (1 - share) * table[below + 1] ** share
        assert float(sigma) == pytest.approx(expected, rel=1e-6)


def test_aligned_steps_are_svd_s_alone() -> None:
    with pytest.raises(
        SettingsError, match=r'schedule "ays": expected a model .* got 0\.002 to 500'
    ) as caught:
        schedules.ays(10, 0.002, 500.0)
    assert 'schedule="karras"' in caught.value.remedy


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [700]),
        (2, [700, 13.678]),
        (4, [700, 128.56, 13.678, 0.49688]),
        (6, [700, 266.19, 86.664, 22.76, 4.3526, 0.49688]),
        (8, [700, 315.74, 128.56, 45.851, 13.678, 3.1666, 0.49688, 0.039754]),
    ],
)
def test_the_lcm_schedule_is_animatelcm_s(steps: int, expected: list[float]) -> None:
    """The levels that its scheduler takes with 40 training steps, to five digits."""
    sigmas = schedules.lcm(steps, 0.002, 700.0)
    torch.testing.assert_close(sigmas, torch.tensor([*expected, 0.0]), rtol=5e-5, atol=0)


def test_all_forty_lcm_levels_are_karras_s() -> None:
    assert torch.equal(schedules.lcm(40, 0.002, 700.0), schedules.karras(40, 0.002, 700.0))
    with pytest.raises(
        SettingsError, match='num_inference_steps: expected 1 to 40 with schedule "lcm", got 41'
    ):
        schedules.lcm(41, 0.002, 700.0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 25, 40])
def test_every_schedule_falls_to_zero_in_its_steps(name: str, steps: int) -> None:
    sigmas = SCHEDULES[name].levels(steps, 0.002, 700.0, 7.0)
    assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), torch.float32)
    assert (float(sigmas[0]), float(sigmas[-1])) == (700.0, 0.0)
    assert bool((sigmas.diff() < 0).all())


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


def test_constant_guidance_is_the_maximum() -> None:
    assert guiders.constant(1, 3, 2, 3).tolist() == [[3.0] * 3] * 2


def test_a_triangle_is_sgm_s() -> None:
    """SV3D's: 21 frames, 1 to 2.5, the top at index 10; sgm's formula for an even number as well."""
    expected = [*torch.linspace(1, 2.5, 11).tolist(), *torch.linspace(1, 2.5, 11).tolist()[-2::-1]]
    assert guiders.triangle(1, 2.5, 1, 21)[0].tolist() == pytest.approx(expected, rel=1e-6)
    for frames in (1, 2, 14):
        values = torch.linspace(0, 1, frames)
        wave = 2 * (values - (values + 0.5).floor()).abs()
        expected_scales = wave * (3.0 - 1.0) + 1.0
        torch.testing.assert_close(guiders.triangle(1, 3, 1, frames)[0], expected_scales)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (9, [3.0] * 9),
        (14, [1.0, *[3.0] * 12, 1.0]),
        (25, [1.0, 3.0, *[3.0] * 21, 3.0, 1.0]),
        (30, [1.0, 2.0, 3.0, *[3.0] * 24, 3.0, 2.0, 1.0]),
    ],
)
def test_a_trapezoid_has_its_plateau_at_the_maximum(frames: int, expected: list[float]) -> None:
    """sgm's rise and fall; its plateau is 1."""
    assert guiders.trapezoid(1, 3, 2, frames).tolist() == [expected] * 2


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("frames", [1, 2, 14])
def test_every_guider_has_a_scale_for_each_frame_between_the_two(name: str, frames: int) -> None:
    scales = GUIDERS[name].scales(1.0, 3.0, 2, frames)
    assert (scales.shape, scales.dtype) == ((2, frames), torch.float32)
    assert 1 <= float(scales.min()) <= float(scales.max()) <= 3
    assert torch.equal(scales[0], scales[1])


def test_own_guidance_scales_are_those_of_every_video() -> None:
    assert guiders.given([1.0, 2.5], 3).tolist() == [[1.0, 2.5]] * 3


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_steps_are_refused(name: str) -> None:
    with pytest.raises(
        SettingsError, match=r"num_inference_steps: expected a whole number of at least 1, got 0"
    ):
        SCHEDULES[name].levels(0, 0.002, 700.0, 7.0)


@pytest.mark.parametrize(
    "levels",
    [[], [1.0], [1.0, 2.0], [2.0, 2.0, 0.0], [2.0, math.nan, 0.0], [math.inf, 1.0, 0.0], [1.0, -0.5]],
    ids=str,
)
def test_impossible_noise_levels_are_refused(levels: list[float]) -> None:
    with pytest.raises(SettingsError, match=r"sigmas: expected two or more .* got .* pass n \+ 1 levels"):
        schedules.given(levels)
