"""Times on a clock of the test's own: known costs come out as known figures, whoever takes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svd_bench.measuring.timing import Lap, Timer, interleave, mean_joules, paired, spread, timer_for
from tests.bench.fakes import FakeClock


def test_a_known_sleep_comes_out_as_a_known_time() -> None:
    clock = FakeClock()
    lap, result = clock.timer().lap(lambda: clock.pass_ms(40) or "done")
    assert (lap.ms, lap.joules, result) == (pytest.approx(40), pytest.approx(0.04), "done")


def test_the_device_is_waited_for_before_the_clock_is_read() -> None:
    clock, log = FakeClock(), []

    def finish() -> None:
        log.append("wait")
        clock.pass_ms(5)  # what the device still had to do

    def now() -> float:
        log.append("read")
        return clock.seconds

    lap, _ = Timer(finish, now).lap(lambda: log.append("call"))
    assert log == ["wait", "read", "call", "wait", "read"]
    assert lap.ms == pytest.approx(5)  # the work before the call is not the call's
    assert lap.joules is None


def test_subjects_take_turns_and_the_order_turns() -> None:
    clock, log = FakeClock(), []

    def subject(name: str, ms: float) -> None:
        log.append(name)
        clock.pass_ms(ms)

    calls = {"a": lambda: subject("a", 1), "b": lambda: subject("b", 2), "c": lambda: subject("c", 3)}
    laps = interleave(calls, 4, clock.timer())
    assert "".join(log) == "abcbcacababc"
    assert {name: [round(lap.ms, 6) for lap in own] for name, own in laps.items()} == {
        "a": [1] * 4,
        "b": [2] * 4,
        "c": [3] * 4,
    }


def test_median_and_percentiles_are_those_of_numpy() -> None:
    ms = [3.0, 1.0, 10.0, 2.0, 7.0]
    got = spread([Lap(value) for value in ms])
    assert (got.p10, got.median, got.p90) == tuple(np.quantile(ms, [0.1, 0.5, 0.9]))
    assert got.runs == 5


def test_a_ratio_is_of_the_rounds_that_both_shared() -> None:
    """The machine was half as fast in the second half: it is in neither ratio."""
    theirs = [Lap(10), Lap(10), Lap(20), Lap(20)]
    ours = [Lap(8), Lap(7), Lap(16), Lap(18)]
    got = paired(ours, theirs)
    assert (got.median, got.low, got.high, got.rounds) == (pytest.approx(0.8), 0.7, 0.9, 4)
    assert got.differs
    assert paired([Lap(8), Lap(11)], [Lap(10), Lap(10)]).differs is False
    assert paired([Lap(8)], [Lap(10)]).differs is None  # one round says nothing of the next
    assert paired(theirs, theirs).rounds is None


def test_energy_is_the_mean_of_what_was_counted() -> None:
    assert mean_joules([Lap(1, 2.0), Lap(1, 4.0), Lap(1)]) == 3.0
    assert mean_joules([Lap(1)]) is None


def test_the_cpu_has_nothing_to_wait_for() -> None:
    lap, result = timer_for(torch.device("cpu")).lap(lambda: 3)
    assert result == 3
    assert lap.ms >= 0
