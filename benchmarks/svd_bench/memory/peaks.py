"""Peak memory of one case, measured in a process of its own: Case in on stdin, Peaks out as JSON.

In the process that times, subjects lie in memory side by side and allocators keep what the last one
freed; a fresh process holds one subject and nothing else, and is measured the same way for all.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from types import TracebackType

import psutil
from pydantic import BaseModel, ConfigDict

from svd_bench.subjects.cases import Case
from svd_engine.errors import BackendError
from svd_engine.host_memory import give_back_freed

INTERVAL_S = 0.002


class Peaks(BaseModel):
    """Highest during a call after the first, weights included.  Bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: int | None = None  # resident memory of the process
    driver: int | None = None  # device memory that came into use since before the process used the device
    torch: int | None = None  # of torch's allocator


class PeakSampler:
    """Reads a figure in a thread while its `with` block runs; `peak` is the highest value seen."""

    def __init__(self, read: Callable[[], int], interval_s: float = INTERVAL_S) -> None:
        self.read, self.interval_s = read, interval_s
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self.read())
            if self._stop.wait(self.interval_s):
                self.peak = max(self.peak, self.read())
                return

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def peaks_in_child(case: Case) -> Peaks:
    """Raises BackendError with the child's last words when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "svd_bench.memory.peaks"],
        input=case.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        killed = "killed, as when memory runs out" if done.returncode == -9 else ""
        words = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BackendError(
            f"peak memory of {case}",
            expected="a process that runs it alone",
            got=killed or words[-1],
            remedy="Free memory, choose a smaller setting, or leave memory out with --no-memory.",
        )
    return Peaks.model_validate_json(done.stdout.strip().splitlines()[-1])


def measure(case: Case) -> Peaks:
    """In this process, which must have touched no GPU yet."""
    import torch

    from svd_bench.measuring.nvml import open_gpu
    from svd_bench.measuring.timing import timer_for
    from svd_bench.subjects.opening import open_case

    device = torch.device(case.subject.device)
    gpu, _ = open_gpu(device)
    before = gpu.used_bytes() if gpu else 0
    timer = timer_for(device)
    running = open_case(case)
    timer.lap(running)  # whatever happens once: compiling, choosing kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    process = psutil.Process()
    driver = PeakSampler(gpu.used_bytes if gpu else lambda: 0)
    with PeakSampler(lambda: int(process.memory_info().rss)) as host, driver:
        timer.lap(running)
    return Peaks(
        host=host.peak,
        driver=driver.peak - before if gpu else None,
        torch=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def release() -> None:
    """Gives freed memory back to device and system, so that the next subject starts as the first did."""
    import torch

    gc.collect()  # the exporter leaves its network in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_freed()  # most of a UNet


def main() -> None:
    print(measure(Case.model_validate_json(sys.stdin.read())).model_dump_json())


if __name__ == "__main__":
    main()
