"""What stops a measurement: every wrong output, and every place that was not asked for."""

from __future__ import annotations

import pytest
import torch

from svd_bench.measuring.check import VIDEO_TOLERANCES, check_output, check_placement, tolerance
from svd_engine.errors import BackendError, BackendUnavailable, NonFiniteOutput
from svd_engine.networks.parity import TOLERANCES
from svd_engine.spec.network import Placement

CPU = torch.device("cpu")


def test_the_difference_is_relative_to_the_largest_value() -> None:
    reference = torch.tensor([1.0, -8.0, 2.0])
    assert check_output("x", reference + torch.tensor([0.0, 0.0, 0.4]), reference, 0.1) == pytest.approx(0.05)
    assert check_output("x", reference, reference, 0.0) == 0


def test_another_shape_is_refused() -> None:
    with pytest.raises(BackendError, match=r"x: expected shape \[2\], got \[3\]. Nothing was timed"):
        check_output("x", torch.zeros(3), torch.ones(2), 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(NonFiniteOutput, match=r"finite .* NaN or infinity in 1 of 2 .* another --dtype"):
        check_output("x", torch.tensor([value, 1.0]), torch.ones(2), 1)


def test_a_difference_beyond_the_tolerance_is_refused() -> None:
    got, reference = torch.tensor([1.5, 2.0]), torch.tensor([0.75, 1.5])
    with pytest.raises(BackendError, match=r"diffusers' own within 0.01 .* a difference of 0.5. .*verify"):
        check_output("x", got, reference, 0.01)


def test_a_reference_of_zeros_proves_nothing() -> None:
    with pytest.raises(BackendError, match="a difference of nan"):
        check_output("x", torch.zeros(2), torch.zeros(2), 1)


@pytest.mark.parametrize(
    "placement",
    [
        Placement("eager", "cpu", "float32"),
        Placement("compiled", "cuda:0", "float32"),
        Placement("compiled", "cpu", "bfloat16"),
    ],
)
def test_a_fall_back_is_an_error(placement: Placement) -> None:
    with pytest.raises(BackendUnavailable, match=r"ran x: expected compiled cpu float32, got .* not timed"):
        check_placement("x", placement, "compiled", "cpu", "float32")


def test_what_was_asked_for_passes() -> None:
    check_placement("x", Placement("eager", "cpu", "float32", "torch 2"), "eager", "cpu", "float32")


def test_videos_have_a_tolerance_for_every_type() -> None:
    assert TOLERANCES.keys() == VIDEO_TOLERANCES.keys()


def test_tf32_is_allowed_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert tolerance("denoiser_step", "float32", cuda) == TOLERANCES["float16"]
    assert tolerance("denoiser_step", "float32", CPU) == TOLERANCES["float32"]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert tolerance("denoiser_step", "float32", cuda) == TOLERANCES["float32"]
    assert tolerance("whole_video", "bfloat16", cuda) == VIDEO_TOLERANCES["bfloat16"]
