"""Times the stages and denoiser evaluations of one generation, on the device's own clock, without stalls.

A GPU runs behind the host: an evaluation is timed by two events on its stream, read after the last one, and
only stages are synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import torch

from svd_engine.observer import UNOBSERVED, Observer


class Clock:
    """Milliseconds of stages by name, of evaluations of the denoiser and of steps, in their order.

    Tells `observer` when a stage begins and ends.
    """

    def __init__(self, device: torch.device, observer: Observer = UNOBSERVED) -> None:
        self.device, self.observer = device, observer
        self.stages: dict[str, float] = {}
        self._on_cpu: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._step_ends: list[int] = [0]  # evaluations until then

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.observer.on_stage_begin(name)
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # a broken device has nothing to add to the first error
                self._synchronize()  # another thread, with another stream, may be next
            raise
        self._synchronize()
        self.stages[name] = self.stages.get(name, 0.0) + (time.perf_counter() - start) * 1e3
        self.observer.on_stage_end(name)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._on_cpu.append((time.perf_counter() - start) * 1e3)
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def end_step(self) -> None:
        """The evaluations since the last one belong to one step."""
        self._step_ends.append(len(self._on_cpu) + len(self._events))

    @property
    def evaluations(self) -> list[float]:
        self._synchronize()
        return self._on_cpu + [before.elapsed_time(after) for before, after in self._events]

    @property
    def steps(self) -> list[float]:
        """Of the denoiser in each step."""
        evaluations = self.evaluations
        return [sum(evaluations[start:end]) for start, end in pairwise(self._step_ends)]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
