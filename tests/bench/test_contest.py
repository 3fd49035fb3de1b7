"""Subjects of known cost give a known table; what is wrong is never timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_bench.contest.contest import Bench, contest
from svd_bench.documents.results import Row, read_results
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.nvml import Gpu
from svd_bench.subjects.cases import Case
from svd_engine.errors import BackendError, BackendUnavailable, NonFiniteOutput
from svd_engine.spec.network import Placement
from tests.bench.fakes import FakeClock, FakeOpenCase, bench, case

OUTPUT = torch.tensor([1.0, 2.0])
THEIRS, EAGER, ORT = case("diffusers"), case(), case(backend="onnxruntime")
COSTS = {THEIRS: (100, [10, 10, 40]), EAGER: (50, [8, 8, 8]), ORT: (20, [4, 5, 6])}  # first call, calls


class Machine:
    """Opens cases at a price of 1000 ms, and remembers what happened."""

    def __init__(self, **changed: Any) -> None:
        self.clock, self.log, self.open, self.most = FakeClock(), [], 0, 0
        self.changed = changed  # of every subject of ours

    def open_case(self, one: Case) -> FakeOpenCase:
        self.clock.pass_ms(1000)
        self.log.append(f"open {one.subject.name} {one.subject.backend}")
        first, calls = COSTS.get(one, (50, [8.0]))
        placement = Placement(one.subject.backend, "cpu", "float32")
        given: dict[str, Any] = {"output": OUTPUT, "placements": (placement,)}
        if one.subject.name == "svd-engine":
            given |= self.changed
        name = f"{one.subject.name} {one.subject.backend}"
        return FakeOpenCase(self.clock, name, first, calls, log=self.log, **given)

    def bench(self, **changed: Any) -> Bench:
        return bench(self.clock, self.open_case, **changed)


def rows(of: Bench) -> list[Row]:
    return list(of.recorder.results().rows)


def test_known_costs_give_a_known_table() -> None:
    here = Machine().bench()
    contest(here, [THEIRS, EAGER, ORT], OUTPUT, flop=4e6)
    table = [(r.subject, r.backend, round(r.latency_ms.median, 6), r.latency_ms.runs) for r in rows(here)]
    assert table == [
        ("diffusers", "eager", 10, 6),  # against each of the two, three rounds
        ("svd-engine", "eager", 8, 3),
        ("svd-engine", "onnxruntime", 5, 3),
    ]
    assert [round(r.first_call_ms or 0) for r in rows(here)] == [1100, 1050, 1020]
    ratios = [r.of_diffusers.model_dump() for r in rows(here) if r.of_diffusers]
    assert ratios == [  # of 10, 10 and 40 ms: 8, 8, 8 and 4, 5, 6, each over that of its own round
        {"median": 1, "low": None, "high": None, "rounds": None},
        pytest.approx({"median": 0.8, "low": 0.2, "high": 0.8, "rounds": 3}),
        pytest.approx({"median": 0.4, "low": 0.15, "high": 0.5, "rounds": 3}),
    ]
    # 4 MFLOP at the better of 1 and 4 GFLOP/s are 1 ms
    assert [r.share_of_ceiling for r in rows(here)] == [
        pytest.approx(0.1), pytest.approx(0.125), pytest.approx(0.2)
    ]  # fmt: skip
    assert [r.energy_j for r in rows(here)] == [
        pytest.approx(0.02),
        pytest.approx(0.008),
        pytest.approx(0.005),
    ]
    assert [r.peak_host_bytes for r in rows(here)] == [7, 7, 7]
    assert [r.max_abs_difference for r in rows(here)] == [0, 0, 0]


def test_rounds_are_shared_with_the_first_and_two_are_open_at_most() -> None:
    machine = Machine()
    contest(machine.bench(repeat=2), [THEIRS, EAGER, ORT], OUTPUT, None)
    theirs, eager, ort = "diffusers eager", "svd-engine eager", "svd-engine onnxruntime"
    assert machine.log == [
        f"open {theirs}", theirs,
        f"open {eager}", eager, theirs, eager, eager, theirs, f"close {eager}",
        f"open {ort}", ort, theirs, ort, ort, theirs, f"close {ort}",
        f"close {theirs}",
    ]  # fmt: skip


def test_warm_up_rounds_are_not_counted() -> None:
    machine = Machine()
    here = machine.bench(repeat=1)
    object.__setattr__(here, "warmup", 2)
    contest(here, [THEIRS], None, None)
    assert rows(here)[0].latency_ms.median == pytest.approx(40)  # the third call after the first
    assert rows(here)[0].latency_ms.runs == 1


def test_without_a_reference_the_first_is_it() -> None:
    moved = OUTPUT + torch.tensor([0.0, 1e-4])
    here = Machine(output=moved).bench()
    contest(here, [THEIRS, EAGER], None, None)
    assert [r.max_abs_difference for r in rows(here)] == [0, pytest.approx(5e-5, rel=1e-2)]


def test_ours_alone_is_timed_alone() -> None:
    here = Machine().bench()
    contest(here, [EAGER], OUTPUT, None)
    assert [(r.subject, r.of_diffusers, r.share_of_ceiling) for r in rows(here)] == [
        ("svd-engine", None, None)
    ]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"output": OUTPUT * 1.01}, BackendError),
        ({"output": OUTPUT * float("nan")}, NonFiniteOutput),
        ({"placements": (Placement("eager", "cpu", "float16"),)}, BackendUnavailable),
        (
            {"placements": (Placement("eager", "cpu", "float32"), Placement("ort", "cpu", "float32"))},
            BackendUnavailable,
        ),
    ],
)
def test_a_wrong_output_or_a_fall_back_stops_it(changed: dict[str, Any], error: type[Exception]) -> None:
    machine = Machine(**changed)
    here = machine.bench()
    with pytest.raises(error, match="svd-engine eager float32"):
        contest(here, [THEIRS, EAGER, ORT], OUTPUT, None)
    assert rows(here) == []
    assert machine.log == [
        "open diffusers eager", "diffusers eager", "open svd-engine eager", "svd-engine eager",
        "close svd-engine eager", "close diffusers eager",
    ]  # fmt: skip


def test_what_was_measured_before_is_kept(tmp_path: Path) -> None:
    machine = Machine()
    here = machine.bench(path=tmp_path / "run.json")

    def cut() -> Any:
        yield from (THEIRS, EAGER)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contest(here, cut(), OUTPUT, None)
    assert [r.subject for r in read_results(tmp_path / "run.json").rows] == ["diffusers", "svd-engine"]
    assert machine.log[-1] == "close diffusers eager"


def test_a_peak_that_cannot_be_measured_is_a_warning() -> None:
    def killed(one: Case) -> Peaks:
        raise BackendError(f"peak of {one}", expected="a", got="killed", remedy="b.")

    here = Machine().bench(peaks=killed)
    contest(here, [EAGER], OUTPUT, None)
    assert rows(here)[0].peak_host_bytes is None
    assert "killed" in here.recorder.results().warnings[0]


def test_a_rung_that_changes_nothing_is_left_out() -> None:
    machine = Machine(rewrites=())
    here = machine.bench()
    contest(
        here,
        [THEIRS, case(note="+ nothing"), case(backend="compiled", note="no rewrites")],
        OUTPUT,
        None,
        True,
    )
    assert [(r.backend, r.note) for r in rows(here)] == [("eager", ""), ("compiled", "no rewrites")]
    assert here.recorder.results().warnings == ("denoiser_step: no rung '+ nothing', it found no place",)
    assert "svd-engine eager" not in machine.log  # opened, never called
    assert "close svd-engine eager" in machine.log


def test_a_clock_that_moved_is_recorded_and_warned_of() -> None:
    class Falling:
        NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
        mhz = iter([1980, 1500])

        def __getattr__(self, name: str) -> Any:
            return {
                "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
                "nvmlDeviceGetClockInfo": lambda handle, kind: next(self.mhz),
                "nvmlDeviceGetTemperature": lambda handle, kind: 71,
                "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
            }[name]

    here = Machine().bench()
    object.__setattr__(here, "gpu", Gpu(Falling(), "a"))
    contest(here, [EAGER], OUTPUT, None)
    read = rows(here)[0].clocks
    assert read is not None
    assert (read.before_mhz, read.after_mhz, read.temperature_c, read.throttled) == (1980, 1500, 71, False)
    assert "moved from 1980 to 1500 MHz" in here.recorder.results().warnings[0]
