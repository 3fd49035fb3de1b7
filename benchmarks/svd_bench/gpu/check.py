"""Everything that a GPU can show in minutes: `python -m svd_bench.gpu_check --out DIR` from a checkout.

Needs torch, numpy and a few pure packages, no network.  Stages run most valuable first; each is begun only
when enough time is left, is stopped when the time is over, and whatever it raises is recorded and the next
one begun.  The document is written after every row and every stage.
"""

from __future__ import annotations

import ctypes
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from svd_bench.documents.recorder import Recorder, out_folder
from svd_bench.documents.results import Outcome, Results
from svd_bench.documents.table import GIB
from svd_bench.gpu.context import Context, Skipped
from svd_bench.gpu.stage import GpuStage
from svd_bench.gpu.stages import GPU_STAGES
from svd_bench.measuring.environment import environment
from svd_bench.measuring.nvml import Gpu, open_gpu
from svd_bench.measuring.progress import Progress
from svd_bench.measuring.timing import timer_for
from svd_bench.report.views import tables_of
from svd_engine.backends.choose import resolve
from svd_engine.errors import BackendUnavailable
from svd_engine.values import one_of

REHEARSAL = "rehearsal, no GPU: "  # begins every line of one
RESERVE_S = 10.0  # left for the summary


class OutOfTime(BaseException):
    """Not an Exception, so that no library takes it for a failure of its own and goes on."""


def check_gpu(
    out: Path,
    device: str,
    limit_s: float,
    only: Sequence[str],
    command: Sequence[str],
    stages: Sequence[GpuStage] = GPU_STAGES,
    rehearse: bool = False,
) -> int:
    """Says what it found first, writes OUT/gpu-check.json and prints the summary last.

    `only` names stages to run after the first, none of them meaning all.  With `rehearse` the stages run on
    the CPU on tiny networks, and every line and the document say so.  Returns 1 when a stage failed, else 0.
    Raises SettingsError for a stage that is none, BackendUnavailable without a GPU unless it is a rehearsal.
    """
    mark = REHEARSAL if rehearse else ""
    for name in only:
        one_of("stage", name, tuple(stage.name for stage in stages))
    where = torch.device("cpu") if rehearse else resolve(device)
    started = time.monotonic()
    gpu, why_not = open_gpu(where)
    print(f"{mark}{describe_device(where, gpu)}", flush=True)
    if where.type != "cuda" and not rehearse:
        raise BackendUnavailable(
            "gpu-check",
            expected="a CUDA GPU that torch can use",
            got=f"device {where}",
            remedy="Run it where one is, or rehearse its stages on tiny networks on the CPU with --rehearse.",
        )
    path = out_folder(out) / "gpu-check.json"
    recorder = Recorder("gpu-check", environment(where, gpu, command), path, rehearse)
    recorder.warn(why_not)

    def say(line: str) -> None:
        print(f"{mark}[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    timer = timer_for(where, gpu.joules if gpu else lambda: None)
    context = Context(where, gpu, timer, recorder, say)
    chosen = [stage for stage in stages if not only or stage is stages[0] or stage.name in only]
    run_stages(context, chosen, lambda: limit_s - (time.monotonic() - started), say)
    results = recorder.results()
    print("\n".join(f"{mark}{line}".rstrip() for line in summary(results).splitlines()))
    return int(any(outcome.status == "failed" for outcome in results.outcomes))


def describe_device(device: torch.device, gpu: Gpu | None) -> str:
    """The GPU and what drives it, or why there is none."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        driver = gpu.driver() if gpu else "unknown"
        return (
            f"GPU: {card.name}, {card.total_memory / GIB:.0f} GiB, compute capability "
            f"{card.major}.{card.minor}, driver {driver}, CUDA {torch.version.cuda}; {versions}"
        )
    if not torch.backends.cuda.is_built():
        return f"no CUDA GPU: this torch is built without CUDA; {versions}"
    if not torch.cuda.is_available():
        return f"no CUDA GPU: torch sees none, is the NVIDIA driver installed? {versions}"
    return f"no CUDA GPU in use: device {device} was asked for; {versions}"


def run_stages(
    context: Context, stages: Sequence[GpuStage], left_s: Callable[[], float], say: Progress
) -> None:
    """Every stage to its outcome in the recorder."""
    for stage in stages:
        say(f"== {stage.name}")
        outcome = run_stage(context, stage, left_s)
        say(f"== {stage.name}: {outcome.status} {outcome.why}")
        context.recorder.ended(outcome)


def run_stage(context: Context, stage: GpuStage, left_s: Callable[[], float]) -> Outcome:
    before = left_s()
    needed = stage.needs_s if context.full else 0
    if before - RESERVE_S < needed:
        why = f"{before:.0f} s were left, it needs about {needed:.0f}"
        return Outcome(stage=stage.name, status="skipped", seconds=0, why=why)

    def ended(status: str, why: str = "", lines: Sequence[str] = ()) -> Outcome:
        return Outcome.model_validate(
            {
                "stage": stage.name,
                "status": status,
                "seconds": before - left_s(),
                "why": why,
                "lines": tuple(lines),
            }
        )

    try:
        with deadline(before - RESERVE_S):
            findings = stage.run(context)
    except Skipped as error:
        return ended("skipped", str(error))
    except OutOfTime:
        return ended("failed", f"stopped after {before - left_s():.0f} s: the time was over")
    except Exception as error:
        if context.full:
            torch.cuda.empty_cache()
        lines = traceback.format_exc().splitlines()
        return ended("failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", lines)
    return ended("passed", lines=findings.lines).model_copy(update={"facts": findings.facts})


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after `seconds`; a timer that was set before goes on afterwards.

    Without timer signals (Windows) it is raised by a thread, and not before a call into C has returned.
    """
    if not hasattr(signal, "setitimer"):
        with _deadline_of_a_thread(seconds):
            yield
        return

    def over(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, over)
    since = time.monotonic()
    remaining, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(remaining - (time.monotonic() - since), 0.001))


@contextmanager
def _deadline_of_a_thread(seconds: float) -> Iterator[None]:
    """Raises OutOfTime by way of the interpreter, in the thread that is in the block."""
    here, lock, inside = threading.get_ident(), threading.Lock(), True

    def over() -> None:
        with lock:
            if inside:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(here), ctypes.py_object(OutOfTime))

    timer = threading.Timer(max(seconds, 0.001), over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            inside = False
        timer.cancel()


def summary(results: Results) -> str:
    """Tables, what each stage found, and what passed, failed and was skipped."""
    parts = [table.text() for table in tables_of(results)]
    for outcome in results.outcomes:
        facts = [f"  {name}: {value}" for name, value in outcome.facts.items()]
        lines = [f"  {line}" for line in outcome.lines]
        if facts or lines:
            parts.append("\n".join([outcome.stage, *facts, *lines]))
    parts += [f"warning: {warning}" for warning in results.warnings]
    width = max((len(o.stage) for o in results.outcomes), default=0)
    ends = [f"{o.status:<8}{o.stage:<{width}}{o.seconds:7.1f} s  {o.why}" for o in results.outcomes]
    return "\n\n".join([*parts, "\n".join(ends)])
