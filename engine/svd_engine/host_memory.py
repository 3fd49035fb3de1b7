"""Memory of the host: how much there is for this process, how much of it is free, and giving some back."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")  # where this process is among them
# files of a control group: its limit, what is taken, and of that what is kept while there is room
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")  # "max" where there is no limit


@dataclass(frozen=True)
class Limit:
    """What a container, or another control group of Linux, allows its processes together, bytes."""

    total: int
    free: int


def free_bytes() -> int:
    """What this process could take beside what it has, without any being moved to the disk."""
    import psutil

    available = int(psutil.virtual_memory().available)
    return min([available, *(limit.free for limit in limits())])


def total_bytes() -> int:
    """Of the machine, or less where a control group allows less."""
    import psutil

    return min([int(psutil.virtual_memory().total), *(limit.total for limit in limits())])


def swap_bytes() -> int:
    """Of the disk, that stand in for memory; 0 where there is none."""
    import psutil

    return int(psutil.swap_memory().total)


def limits(groups: Path = CGROUPS, process: Path = PROCESS) -> list[Limit]:
    """Of the process's control group and of those around it, of either version; none outside Linux."""
    found = []
    for folder, names in _folders(groups, process):
        total, used = (_number(folder / name) for name in names[:2])
        if total and used is not None:
            found.append(Limit(total, max(0, total - used + _reclaimable(folder, names[2]))))
    return found


def _folders(groups: Path, process: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Those of the process's memory, inner before outer, with the names of what is read there.

    In a container the path that the process is told may not be there: only folders around it are.
    """
    lines: list[str] = []
    with suppress(OSError):
        lines = process.read_text(encoding="utf-8", errors="replace").splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if "memory" in controllers.split(","):
            root, names = groups / "memory", V1
        elif not controllers:
            root, names = groups, V2
        else:
            continue
        inner = root / path.lstrip("/")
        yield from ((folder, names) for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _number(file: Path) -> int | None:
    """None for a file that is not there, or holds no amount: it may say that there is no limit."""
    with suppress(OSError, ValueError):
        number = int(file.read_text(encoding="ascii"))
        return number if number >= 0 else None
    return None


def _reclaimable(folder: Path, name: str) -> int:
    """Bytes of files that are only kept because there was room."""
    with suppress(OSError, ValueError):
        content = (folder / "memory.stat").read_text(encoding="ascii")
        stated = re.search(rf"^{name} (\d+)$", content, re.MULTILINE)
        return int(stated[1]) if stated else 0
    return 0


def give_back_freed() -> None:
    """What is free in the C library and not yet in the system: on Linux with glibc, which keeps freed blocks
    below 32 MiB until told not to; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
