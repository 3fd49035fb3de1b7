"""Times calls side by side: the device's work is finished before the clock is read, subjects take turns.

Knows neither networks nor devices: clock, synchronisation and energy counter are given, so that tests run
it on a clock of their own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from svd_bench.documents.results import Ratio, Spread

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Lap:
    ms: float
    joules: float | None = None  # None where nothing counts them


class Timer:
    """`now` counts seconds, `joules` the energy of the device so far."""

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.perf_counter,
        joules: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.synchronize, self.now, self.joules = synchronize, now, joules

    def lap(self, call: Callable[[], T]) -> tuple[Lap, T]:
        """Time and energy of one call, and what it returned."""
        self.synchronize()
        energy, start = self.joules(), self.now()
        result = call()
        self.synchronize()
        ms, after = (self.now() - start) * 1e3, self.joules()
        used = None if energy is None or after is None else after - energy
        return Lap(ms, used), result


def timer_for(device: torch.device, joules: Callable[[], float | None] = lambda: None) -> Timer:
    if device.type != "cuda":
        return Timer()
    import torch

    return Timer(lambda: torch.cuda.synchronize(device), joules=joules)


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int, timer: Timer) -> dict[str, list[Lap]]:
    """`rounds` laps of every call, one each a round.

    The order turns by one every round, so that drift of the machine and the state in which a subject
    leaves it fall on all alike.
    """
    names = list(calls)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            laps[name].append(timer.lap(calls[name])[0])
    return laps


def spread(laps: Sequence[Lap]) -> Spread:
    """Median, 10th and 90th percentile in milliseconds, interpolated linearly between laps."""
    p10, median, p90 = np.percentile([lap.ms for lap in laps], [10, 50, 90])
    return Spread(median=float(median), p10=float(p10), p90=float(p90), runs=len(laps))


def paired(laps: Sequence[Lap], others: Sequence[Lap]) -> Ratio:
    """Time of `laps` over that of `others`, round by round: what slows a round down falls on both.

    Of the same laps it is 1, of which nothing is measured.
    """
    if laps is others:
        return Ratio(median=1.0)
    ratios = [lap.ms / other.ms for lap, other in zip(laps, others, strict=True)]
    return Ratio(median=float(np.median(ratios)), low=min(ratios), high=max(ratios), rounds=len(ratios))


def mean_joules(laps: Sequence[Lap]) -> float | None:
    counted = [lap.joules for lap in laps if lap.joules is not None]
    return sum(counted) / len(counted) if counted else None
