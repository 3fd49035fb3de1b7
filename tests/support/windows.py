"""Doubles of what Windows lacks, and of what it refuses.  They stand for it, as far as Linux can: `pretend`
takes a process of its own, before anything of ours is imported, and after what we stand on, which has a
Windows of its own and looks at `sys.platform`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

LACKING = {
    os: ("O_DIRECTORY", "O_NOFOLLOW", "fork", "sched_getaffinity", "getuid", "geteuid", "fchmod", "mkfifo"),
    signal: ("setitimer", "SIGALRM", "SIGKILL"),
}
MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
PEAK = 5 * 2**30  # of psutil's `peak_wset`


def pretend() -> None:
    """No POSIX modules or calls, Windows' memory figures, and no renaming or removing of what is open."""
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in LACKING.items():
        for name in names:
            delattr(module, name)
    psutil.Process.memory_info = lambda self: SimpleNamespace(rss=PEAK // 2, peak_wset=PEAK)
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # as there: by path, no open folders
    refuse_what_is_open()


def refuse_what_is_open() -> None:
    """Renaming, replacing and removing fail while this process has the file, or one below, open or mapped."""

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            for path in map(Path, paths):
                for held in open_files():
                    if held.name.endswith(".lock"):
                        continue  # filelock has a lock for Windows, which removes its own file
                    if held == path.absolute() or path.absolute() in held.parents:
                        raise PermissionError(13, "The process cannot access the file: it is open", str(held))
            return real(*paths, **options)

        return call

    for name in ("rename", "replace", "remove", "unlink", "rmdir"):
        setattr(os, name, guarded(getattr(os, name)))


def open_files() -> set[Path]:
    """Regular files that this process has open or mapped."""
    descriptors = Path("/proc/self/fd")
    found = set()
    for number in os.listdir(descriptors):
        try:
            found.add(os.readlink(descriptors / number))
        except FileNotFoundError:  # that of the listing itself
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found |= {line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6}
    return {Path(name) for name in found if os.path.isfile(name)}
