"""Where and how a document is measured: the machine, the versions, the commit, the command."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath

import psutil
import torch

from svd_bench.documents.results import Clocks, Environment
from svd_bench.measuring.nvml import Gpu
from svd_engine import report

DIRTY = "+dirty"  # ends the commit of a checkout with changes
CLOCK_DRIFT = 0.05  # share of the clock: more is not noise


def environment(device: torch.device, gpu: Gpu | None, command: Sequence[str]) -> Environment:
    """`command` is the program's name and its arguments."""
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Environment(
        device=card.name if card else cpu_name(),
        device_memory=card.total_memory if card else None,
        driver=gpu.driver() if gpu else None,
        cuda=torch.version.cuda if card else None,
        compute_capability=f"{card.major}.{card.minor}" if card else None,
        cpu=cpu_name(),
        cores=cores(),
        threads=torch.get_num_threads(),
        host_memory=psutil.virtual_memory().total,
        versions=report.versions(),
        commit=commit(Path(__file__).parent),
        command=" ".join(anonymous(argument) for argument in command),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def cpu_name() -> str:
    """The model, where the system tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def commit(folder: Path) -> str:
    """Of the checkout that holds `folder`, with DIRTY when it has changes; "unknown" without one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (DIRTY if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def anonymous(argument: str) -> str:
    """An argument without this machine's folders: of an absolute path only the last part is left."""
    option, equals, value = argument.rpartition("=")
    path = PureWindowsPath(value)  # takes both kinds of separator, and drives
    if not path.anchor and not value.startswith(("~", "..")):
        return argument
    return f"{option}{equals}{path.name}"


def clocks(gpu: Gpu, before_mhz: int) -> Clocks:
    """Read right after the measurement that `before_mhz` was read before."""
    return Clocks(
        before_mhz=before_mhz,
        after_mhz=gpu.clock_mhz(),
        temperature_c=gpu.temperature_c(),
        throttled=gpu.throttled(),
    )


def clock_warning(what: str, read: Clocks) -> str | None:
    """What a reader must know of clocks that did not hold still, or None."""
    if read.throttled:
        return f"{what}: the GPU was held back (heat or power brake) at {read.temperature_c} C"
    if abs(read.after_mhz - read.before_mhz) > CLOCK_DRIFT * read.before_mhz:
        return f"{what}: the GPU clock moved from {read.before_mhz} to {read.after_mhz} MHz while measuring"
    return None
