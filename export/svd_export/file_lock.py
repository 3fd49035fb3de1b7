"""One process at a time, on every system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock


@contextmanager
def locked(file: Path, *, wait: bool) -> Iterator[None]:
    """Holds the lock `file`, which is made for it and removed afterwards; a process that dies gives it up.

    Raises filelock.Timeout when another process holds it and `wait` is false, OSError when `file` cannot be
    made.
    """
    lock = filelock.FileLock(file, blocking=wait)
    with lock:
        try:
            yield
        finally:
            if isinstance(lock, filelock.UnixFileLock):  # the other kinds remove their file themselves
                with suppress(OSError):
                    file.unlink()  # while it is held: whoever waits for it sees that, and makes a new one
