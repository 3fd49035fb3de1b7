"""What a person sees of TensorRT's phases."""

from __future__ import annotations

import pytest

from svd_export.tensorrt_progress import BuildProgress


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_phase_inside_is_part_of_a_step_outside(clock: Clock) -> None:
    progress = BuildProgress("denoiser", lambda line: None, clock)
    assert progress.done == 0
    progress.start("Building", 4)
    progress.step("Building", 0)
    assert progress.done == 0.25
    progress.start("Timing", 10)
    progress.step("Timing", 4)
    assert progress.done == pytest.approx((1 + 0.5) / 4)
    progress.finish("Timing")
    assert progress.done == 0.25
    progress.finish("Building")
    assert progress.done == 0


def test_time_left_and_how_often_it_is_said(clock: Clock) -> None:
    said: list[str] = []
    progress = BuildProgress("denoiser", said.append, clock)
    progress.start("Building", 10)
    for step in range(5):
        clock.time += 4
        progress.step("Building", step)
    assert said == ["denoiser: Building, 20%, about 32 s left", "denoiser: Building, 40%, about 24 s left"]


def test_minutes(clock: Clock) -> None:
    progress = BuildProgress("denoiser", lambda line: None, clock)
    progress.start("Building", 10)
    clock.time = 120
    progress.step("Building", 1)
    assert progress.left() == ", about 8 min left"


def test_a_phase_without_steps_and_a_step_of_no_phase(clock: Clock) -> None:
    said: list[str] = []
    progress = BuildProgress("denoiser", said.append, clock)
    clock.time = 10
    progress.step("unknown", 3)
    assert said == []
    progress.start("Loading", 0)
    progress.step("Loading", 0)
    assert said == ["denoiser: Loading, 0%"]
