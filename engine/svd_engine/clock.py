"""Times the stages and steps of one generation, on the device's own clock, without a stall per step.

A GPU runs behind the host: a step is timed by two events on its stream, read after the last one, and
only stages are synchronised.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from svd_engine.observer import UNOBSERVED, Observer


class Clock:
    """`stages` holds milliseconds by stage, `steps` milliseconds of every denoiser step.

    Tells `observer` when a stage begins and ends.
    """

    def __init__(self, device: torch.device, observer: Observer = UNOBSERVED) -> None:
        self.device, self.observer = device, observer
        self.stages: dict[str, float] = {}
        self._cpu_steps: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

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
    def step(self) -> Iterator[None]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self._cpu_steps.append((time.perf_counter() - start) * 1e3)
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    @property
    def steps(self) -> list[float]:
        self._synchronize()
        return self._cpu_steps + [before.elapsed_time(after) for before, after in self._events]

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
