"""Every number of a call has a range; outside it the error names the argument, the range and the value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from svd_engine.errors import SettingsError
from svd_engine.request import Settings
from svd_engine.values import at_least, check_seed

NAN, INFINITE = float("nan"), float("inf")


def settings(**asked: Any) -> Settings:
    return Settings(**{"frames": 14, "height": 576, "width": 1024, **asked})


WRONG: list[tuple[str, str, Any]] = [
    *(("frames", "num_frames", value) for value in (0, -1, 2.5, "14", True, None, NAN, INFINITE)),
    *(("frames", "num_frames", value) for value in (np.bool_(True), np.array([14, 14]), torch.ones(2))),
    ("height", "height", 0),
    ("height", "height", torch.tensor(64.5)),
    ("width", "width", -64),
    ("steps", "num_inference_steps", 0),
    ("fps", "fps", 0),
    ("fps", "fps", 7.5),
    ("videos_per_image", "num_videos_per_prompt", 0),
    ("decode_chunk_size", "decode_chunk_size", 0),
    *(("motion_bucket_id", "motion_bucket_id", value) for value in (-1, 1024, 2000, 1023.5, NAN, "127")),
    *(("noise_aug_strength", "noise_aug_strength", value) for value in (-0.02, NAN, INFINITE, "0.1", True)),
    *(("min_guidance_scale", "min_guidance_scale", value) for value in (NAN, -INFINITE, None)),
    *(("max_guidance_scale", "max_guidance_scale", value) for value in (NAN, INFINITE, "3", 10**400)),
    ("max_guidance_scale", "max_guidance_scale", np.float32(np.nan)),
    *(("churn", "churn", value) for value in (-1, NAN, "1")),
    *(("rho", "rho", value) for value in (0, 0.09, 1001, NAN)),
]


@pytest.mark.parametrize(("field", "name", "value"), WRONG)
def test_out_of_range(field: str, name: str, value: object) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(**{field: value})
    error = caught.value
    assert isinstance(error, ValueError)  # what callers of diffusers catch
    assert (error.what, error.got, error.exit_code) == (name, repr(value), 2)
    assert error.expected.split()[0] in ("a", "0", "0.1")
    assert error.remedy == "Pass a value in this range."


@pytest.mark.parametrize(
    "good",
    [
        {"frames": 1, "steps": 1, "fps": 1, "videos_per_image": 1, "decode_chunk_size": 1},
        {"motion_bucket_id": 0, "noise_aug_strength": 0},
        {"rho": 0.1},
        {"motion_bucket_id": 1023, "noise_aug_strength": 10.0},
        {"min_guidance_scale": -1, "max_guidance_scale": 0},
    ],
)
def test_the_ends_of_the_ranges(good: dict[str, Any]) -> None:
    made = settings(**good)
    assert {name: getattr(made, name) for name in good} == good


@pytest.mark.parametrize(
    "seven",
    [7, 7.0, np.int64(7), np.uint8(7), np.float32(7), np.array(7), torch.tensor(7), torch.tensor([7.0])],
)
def test_whole_numbers_of_any_kind_are_ints(seven: Any) -> None:
    names = ("frames", "height", "width", "steps", "fps", "videos_per_image", "decode_chunk_size")
    made = settings(**dict.fromkeys(names, seven))
    for name in names:
        assert type(getattr(made, name)) is int
        assert getattr(made, name) == 7


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.float16(0.5), torch.tensor(0.5).bfloat16()])
def test_real_numbers_of_any_kind_are_floats(number: Any) -> None:
    names = ("motion_bucket_id", "noise_aug_strength", "min_guidance_scale", "max_guidance_scale")
    made = settings(**dict.fromkeys(names, number))
    assert [(type(getattr(made, name)), getattr(made, name)) for name in names] == [(float, 0.5)] * 4


@pytest.mark.parametrize(
    "levels", [[80, 1.5, 0], (80.0, 1.5, 0.0), np.array([80, 1.5, 0]), torch.tensor([80, 1.5, 0])]
)
def test_noise_levels_of_any_kind_are_floats(levels: Any) -> None:
    assert settings(sigmas=levels).sigmas == (80.0, 1.5, 0.0)


@pytest.mark.parametrize("levels", [3.0, "80,1", ["80"], [[80, 1]], [None], [True], torch.tensor(3.0)])
def test_what_is_no_list_of_noise_levels(levels: Any) -> None:
    with pytest.raises(SettingsError, match="sigmas: expected a list of numbers, got") as caught:
        settings(sigmas=levels)
    assert caught.value.got == repr(levels)


@pytest.mark.parametrize(
    "levels",
    [
        [], [1], [1, 2], [2, 2, 0], [2, NAN, 0], [INFINITE, 1, 0], [1, -0.5], [10**400, 1], [1e39, 1],
        [1 + 1e-12, 1, 0],
    ],
)  # fmt: skip
def test_noise_levels_that_do_not_fall(levels: Any) -> None:
    """As float32, in which the sampler takes them."""
    with pytest.raises(SettingsError, match=r"sigmas: expected two or more .* got .* pass n \+ 1 levels"):
        settings(sigmas=levels)


def test_given_noise_levels_say_the_steps() -> None:
    assert settings(steps=25, sigmas=[80.0, 1.5, 0.0]).steps == 2


@pytest.mark.parametrize(
    ("field", "first"), [("sampler", "euler"), ("schedule", "karras"), ("guider", "linear")]
)
@pytest.mark.parametrize("value", ["Euler", "", None, 1])
def test_an_unknown_name(field: str, first: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{field}: expected {first}, .*, got") as caught:
        settings(**{field: value})
    assert caught.value.remedy == "Choose one of these."


@pytest.mark.parametrize("scales", [[1, 3.0], (1.0, 3.0), np.array([1, 3]), torch.tensor([1, 3])])
def test_guidance_scales_of_any_kind_are_floats(scales: Any) -> None:
    assert settings(frames=2, guidance_scales=scales).guidance_scales == (1.0, 3.0)


@pytest.mark.parametrize("scales", [[], 3.0, "1,2", torch.tensor(3.0)])
def test_what_is_no_list_of_guidance_scales(scales: Any) -> None:
    with pytest.raises(
        SettingsError, match="guidance_scales: expected a list of numbers, one for each frame"
    ):
        settings(frames=2, guidance_scales=scales)


@pytest.mark.parametrize("scales", [[1, NAN], [1, INFINITE], [None, 1], [[1, 2], [1, 2]]])
def test_guidance_scales_that_are_not_finite_numbers(scales: Any) -> None:
    with pytest.raises(SettingsError, match="guidance_scales: expected a finite number, got"):
        settings(frames=2, guidance_scales=scales)


def test_guidance_scales_are_one_for_each_frame() -> None:
    with pytest.raises(
        SettingsError, match="guidance_scales: expected 14 numbers, one for each frame, got 2"
    ):
        settings(guidance_scales=[1.0, 3.0])


@pytest.mark.parametrize(
    ("given", "guided"),
    [
        ({"guidance_scales": [1.0, 1.0]}, False),
        ({"guidance_scales": [0.5, 1.1]}, True),
        ({"guider": "constant", "min_guidance_scale": 3, "max_guidance_scale": 1}, False),
        ({"guider": "triangle", "min_guidance_scale": 3, "max_guidance_scale": 1}, True),
    ],
)
def test_guidance_acts_when_a_scale_that_is_used_is_above_one(given: dict[str, Any], guided: bool) -> None:
    assert settings(frames=2, **given).guided is guided


@pytest.mark.parametrize("fit", ["cover", None, 1])
def test_an_unknown_fit(fit: Any) -> None:
    with pytest.raises(SettingsError, match="fit: expected stretch, crop, pad, got"):
        settings(fit=fit)


@pytest.mark.parametrize(
    ("first", "last", "guided"),
    [
        (1.0, 1.0, False),
        (0.5, 0.9, False),
        (1.0, 1.01, True),
        (1, 3, True),
        (3, 1, True),
        (1.000001, 0, True),
    ],
)
def test_guidance_acts_when_one_of_the_scales_is_above_one(first: float, last: float, guided: bool) -> None:
    assert settings(min_guidance_scale=first, max_guidance_scale=last).guided is guided


@pytest.mark.parametrize(
    ("height", "width", "what", "nearest"),
    [
        (575, 1024, "height", "576"),
        (576, 1000, "width", "1024"),
        (1, 64, "height", "64"),
        (100, 64, "height", "128"),
    ],
)
def test_a_size_that_the_networks_cannot_take(height: int, width: int, what: str, nearest: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(height=height, width=width).check_size(64)
    assert caught.value.what == what
    assert "a multiple of 64 pixels" in str(caught.value)
    assert f"The nearest that works is {nearest}." in str(caught.value)


def test_a_size_that_they_can() -> None:
    settings(height=64, width=2048).check_size(64)


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, None])
def test_a_seed_that_torch_would_refuse_or_change(seed: Any) -> None:
    with pytest.raises(SettingsError, match=r"seed: expected a whole number from 0 to 2\^64 - 1, got"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_other_seed_is_one_for_torch(seed: int) -> None:
    import torch

    check_seed(seed)
    assert torch.Generator("cpu").manual_seed(seed).initial_seed() == seed


def test_at_least_names_the_lowest() -> None:
    at_least("batch", 1, 1)
    with pytest.raises(SettingsError, match="batch: expected a whole number of at least 1, got 0"):
        at_least("batch", 0, 1)
