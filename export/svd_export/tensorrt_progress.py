"""How far TensorRT's builder is, and how long it will still take.  Knows no TensorRT and no network.

The builder announces phases inside phases, each with a number of steps; how many phases will follow
one another it does not tell, so the time left is that of the outermost phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

INTERVAL_S = 5.0  # between two lines


@dataclass
class Phase:
    name: str
    steps: int
    done: int = 0


class BuildProgress:
    """Told of phases and steps; says a line now and then."""

    def __init__(
        self, what: str, say: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.what, self.say, self.now = what, say, now
        self.phases: list[Phase] = []  # outermost first
        self.started = self.said = now()

    def start(self, name: str, steps: int) -> None:
        if not self.phases:
            self.started = self.now()
        self.phases.append(Phase(name, steps))

    def step(self, name: str, step: int) -> None:
        for phase in self.phases:
            if phase.name == name:
                phase.done = step + 1
        if self.phases and self.now() - self.said >= INTERVAL_S:
            self.said = self.now()
            self.say(f"{self.what}: {self.phases[0].name}, {self.done:.0%}{self.left()}")

    def finish(self, name: str) -> None:
        self.phases = [phase for phase in self.phases if phase.name != name]

    @property
    def done(self) -> float:
        """Share of the outermost phase, 0 to 1: a phase inside is a part of one step outside."""
        share = 0.0
        for phase in reversed(self.phases):
            share = min(1.0, (phase.done + share) / phase.steps) if phase.steps else share
        return share

    def left(self) -> str:
        if not self.done:
            return ""
        seconds = (self.now() - self.started) * (1 - self.done) / self.done
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"
