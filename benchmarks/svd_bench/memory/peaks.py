"""Peak memory of one case, measured in a process of its own: Case in on stdin, Peaks out as JSON.

In the process that times, subjects lie in memory side by side and allocators keep what the last one
freed; a fresh process holds one subject and nothing else, and is measured the same way for all.
"""

from __future__ import annotations

import subprocess
import sys

import psutil
import torch

from svd_bench.measuring.children import in_utf8
from svd_bench.measuring.memory import Peaks, PeakSampler
from svd_bench.measuring.nvml import open_gpu
from svd_bench.measuring.timing import timer_for
from svd_bench.subjects.cases import Case
from svd_bench.subjects.opening import open_case
from svd_engine.errors import BackendError


def peaks_in_child(case: Case) -> Peaks:
    """Raises BackendError with the child's last words when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "svd_bench.memory.peaks"],
        input=case.model_dump_json(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=in_utf8(),
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


def measure_peaks(case: Case) -> Peaks:
    """In this process, which must have touched no GPU yet."""
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


def main() -> None:
    print(measure_peaks(Case.model_validate_json(sys.stdin.read())).model_dump_json())


if __name__ == "__main__":
    main()
