"""One stage, several subjects: each opened, checked, then timed in turns with the first of them.

The first subject stays open and every other is timed against it, in the same rounds, then closed: however
many take part, two sets of weights lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import Ceiling, Clocks, Ratio, Row
from svd_bench.measuring.check import check_output, check_placement, tolerance
from svd_bench.measuring.environment import clock_warning, clocks
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.nvml import Gpu
from svd_bench.measuring.progress import Progress
from svd_bench.measuring.timing import Lap, Timer, interleave, mean_joules, paired, spread
from svd_bench.subjects.cases import Case, OpenCase
from svd_engine.errors import BackendError


@dataclass(frozen=True)
class Bench:
    """What a measurement needs besides its subjects; all of it is given, so that tests bring their own."""

    device: torch.device
    timer: Timer
    recorder: Recorder
    ceiling: Ceiling
    open_case: Callable[[Case], OpenCase]
    peaks: Callable[[Case], Peaks]
    gpu: Gpu | None = None
    repeat: int = 5
    warmup: int = 0  # rounds that are not timed, after the first call
    say: Progress = lambda line: None


@dataclass
class CheckedCase:
    """An opened case that has passed its check."""

    case: Case
    running: OpenCase
    first_ms: float
    difference: float
    laps: list[Lap] = field(default_factory=list)
    peaks: Peaks = field(default_factory=Peaks)
    clocks: Clocks | None = None
    of_diffusers: Ratio | None = None


def contest(
    bench: Bench, cases: Iterable[Case], reference: Tensor | None, flop: float | None, skip_same: bool = False
) -> None:
    """Puts a row for every case into the recorder, that of the first case first.

    `reference` is the output that all must give; None means that of the first case.  `flop` is the work
    of one call.  With `skip_same` a case is left out, with a warning, whose rewrites are those of the case
    before it on its backend.  A peak that cannot be measured is None and a warning.
    Raises what `open_case` raises, and NonFiniteOutput or BackendError for a wrong output, BackendUnavailable
    for a fall-back.
    """
    remaining = iter(cases)
    case = next(remaining)
    peaks = _peaks(bench, case)
    anchor, reference = _start(bench, case, _open(bench, case), reference)
    anchor.peaks = peaks
    with closing(anchor.running):
        before = {anchor.case.subject.backend: anchor.running.rewrites}  # the last rung of each backend
        for case in remaining:
            opened = _open(bench, case)
            backend, rewrites = case.subject.backend, opened[0].rewrites
            if skip_same and before.get(backend) == rewrites:
                opened[0].close()
                bench.recorder.warn(f"{case.stage}: no rung {case.note!r}, it found no place")
                continue
            before[backend] = rewrites
            other, _ = _start(bench, case, opened, reference)
            with closing(other.running):
                _rounds(bench, anchor, other)
            _put(bench, anchor, flop)
            _put(bench, other, flop)
            other.peaks = _peaks(bench, case)
            _put(bench, other, flop)
        if not anchor.laps:
            _rounds(bench, anchor)
            _put(bench, anchor, flop)


def _open(bench: Bench, case: Case) -> tuple[OpenCase, float]:
    bench.say(f"{case}: loading")
    lap, running = bench.timer.lap(lambda: bench.open_case(case))
    return running, lap.ms


def _start(
    bench: Bench, case: Case, opened: tuple[OpenCase, float], reference: Tensor | None
) -> tuple[CheckedCase, Tensor]:
    """The case after its first call and its checks, and the reference: the given one or its own output."""
    running, open_ms = opened
    bench.say(f"{case}: first call")
    try:
        lap, output = bench.timer.lap(running)
        for placement in running.placements:
            check_placement(str(case), placement, case.subject.backend, case.subject.device, case.dtype)
        kept = output.clone() if reference is None else reference  # the next call writes over an output
        allowed = tolerance(case.stage, case.dtype, bench.device)
        difference = check_output(str(case), output, kept, allowed)
    except BaseException:
        running.close()
        raise
    return CheckedCase(case, running, open_ms + lap.ms, difference), kept


def _rounds(bench: Bench, *started: CheckedCase) -> None:
    bench.say(
        f"{started[-1].case}: {bench.repeat} rounds" + (" beside the first" if len(started) > 1 else "")
    )
    calls = {str(number): one.running for number, one in enumerate(started)}
    interleave(calls, bench.warmup, bench.timer)
    before = bench.gpu.clock_mhz() if bench.gpu else 0
    laps = interleave(calls, bench.repeat, bench.timer)
    read = clocks(bench.gpu, before) if bench.gpu else None
    for number, one in enumerate(started):
        mine = laps[str(number)]
        one.laps += mine
        one.clocks = read
        if read:
            bench.recorder.warn(clock_warning(str(one.case), read))
        if started[0].case.subject.name == "diffusers":
            one.of_diffusers = paired(mine, laps["0"])


def _peaks(bench: Bench, case: Case) -> Peaks:
    bench.say(f"{case}: peak memory")
    try:
        return bench.peaks(case)
    except BackendError as error:
        bench.recorder.warn(str(error))
        return Peaks()


def _put(bench: Bench, one: CheckedCase, flop: float | None) -> None:
    case, latency = one.case, spread(one.laps)
    row = Row(
        subject=case.subject.name,
        backend=case.subject.backend,
        device=case.subject.device,
        dtype=case.dtype,
        stage=case.stage,
        setting=case.setting,
        rewrites=one.running.rewrites,
        latency_ms=latency,
        first_call_ms=one.first_ms,
        flop=flop,
        share_of_ceiling=bench.ceiling.share(case.dtype, flop, latency.median),
        peak_driver_bytes=one.peaks.driver,
        peak_torch_bytes=one.peaks.torch,
        peak_host_bytes=one.peaks.host,
        energy_j=mean_joules(one.laps),
        max_abs_difference=one.difference,
        of_diffusers=one.of_diffusers,
        clocks=one.clocks,
        note=case.note,
    )
    bench.recorder.put(str(case), row)
