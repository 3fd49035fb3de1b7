"""A clock that only moves when it is told to, and subjects that cost what they say: no timing is real."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from svd_bench.contest.contest import Bench
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import Ceiling
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.timing import Timer
from svd_bench.memory.capped import Attempt
from svd_bench.subjects.cases import Case, Subject
from svd_engine.spec.network import Placement
from tests.bench import documents

CEILING = Ceiling(
    matmul_flops={"float32": 1e9, "bfloat16": 2e9, "float16": 2e9},
    conv_flops={"float32": 4e9, "bfloat16": 1e9, "float16": 1e9},
    copy_bytes=1e9,
)
ATTEMPT = Attempt(
    checkpoint="demo", backend="eager", device="cpu", cap=None, note="", frames=14, height=128, width=192,
    guidance="batched", networks="resident", decode_chunk=14, steps=2, repeat=1,
)  # fmt: skip


class FakeClock:
    """Seconds and joules; one joule a second."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def pass_ms(self, ms: float) -> None:
        self.seconds += ms / 1e3

    def timer(self) -> Timer:
        return Timer(now=lambda: self.seconds, joules=lambda: self.seconds)


@dataclass
class FakeOpenCase:
    """Takes `open_ms` to open, `first_ms` for the first call and then `ms` a call."""

    clock: FakeClock
    name: str
    first_ms: float
    ms: list[float]
    output: Tensor
    placements: tuple[Placement, ...]
    rewrites: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list)
    calls: int = 0

    def __call__(self) -> Tensor:
        self.clock.pass_ms(self.first_ms if not self.calls else self.ms[(self.calls - 1) % len(self.ms)])
        self.calls += 1
        self.log.append(self.name)
        return self.output

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def subject(name: str = "svd-engine", backend: str = "eager", dtype: str = "float32") -> Subject:
    return Subject.model_validate(
        {"name": name, "backend": backend, "checkpoint": "demo", "device": "cpu", "dtype": dtype}
    )


def case(
    name: str = "svd-engine", backend: str = "eager", note: str = "", stage: str = "denoiser_step"
) -> Case:
    return Case(subject=subject(name, backend), stage=stage, setting=documents.setting(), note=note)


def bench(
    clock: FakeClock,
    open_case: Callable[[Case], FakeOpenCase],
    peaks: Callable[[Case], Peaks] = lambda _: Peaks(host=7),
    repeat: int = 3,
    path: Path | None = None,
) -> Bench:
    recorder = Recorder("run", documents.environment(), path)
    return Bench(torch.device("cpu"), clock.timer(), recorder, CEILING, open_case, peaks, None, repeat)
