"""Writes a folder aside and puts it in its place when it is whole, under a lock.

The folder aside is `.NAME.partial` beside the target, so the last step is one rename.  A lock on it says
who works there; it goes with the process, so what a killed one left is cleared by the next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from svd_engine.errors import ExportError

OTHER_PLACE = "choose another place with -o"


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """Yields an empty folder; when the block ends without error it becomes `target`.

    Raises ExportError when `target` exists, its parent does not, or another process is writing it,
    and when the disk is full or not writable.
    """
    target = target.absolute()
    check_free(target)
    aside = target.with_name(f".{target.name}.partial")
    with _refused(target):
        lock = _lock(aside, target)
        try:
            check_free(target)  # whoever held the lock until now may have finished
            _empty(aside)
            yield aside
            _sync(aside)
            check_free(target)
            aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            os.close(lock)


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside `folder`, for files that `move_out` takes into it when they are whole.

    It is gone afterwards, whatever happens.  Raises ExportError when another process works there, or when
    the disk is full or not writable.
    """
    aside = folder.absolute() / ".partial"
    with _refused(folder, "make the folder writable"):
        lock = _lock(aside, folder, "then run the same command")
        try:
            _empty(aside)
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            os.close(lock)


def move_out(path: Path, target: Path) -> None:
    """Puts a whole file in its place, over an older one."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    path.replace(target)


@contextmanager
def _refused(target: Path, otherwise: str = OTHER_PLACE) -> Iterator[None]:
    """What the system refuses becomes ExportError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise ExportError(
            f"writing {target}",
            expected="room and permission to write there",
            got=str(error),
            remedy=f"Free space, or {otherwise}." if full else f"{otherwise[0].upper()}{otherwise[1:]}.",
        ) from error


def check_free(target: Path) -> None:
    """Raises ExportError unless `target` could be made now: a new name in a folder that exists."""
    parent = target.parent
    if not os.path.isdir(parent):
        taken = os.path.lexists(parent)
        raise ExportError(
            f"output {target}",
            expected="an existing folder to write into",
            got=f"{'a file' if taken else 'no folder'} {parent}",
            remedy="Choose another place with -o." if taken else f"Run: mkdir -p {shlex.quote(str(parent))}",
        )
    if os.path.lexists(target):
        raise ExportError(
            f"output {target}",
            expected="a name that is free",
            got="something that exists already",
            remedy="Choose another place with -o, or remove it first.",
        )


def _lock(aside: Path, target: Path, otherwise: str = f"or {OTHER_PLACE}") -> int:
    while True:
        with suppress(FileExistsError):
            aside.mkdir()
        try:
            # a link's folder is not ours to empty
            descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # renamed or removed since by the process that held it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(aside), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise ExportError(
                f"output {target}",
                expected="no other export into the same place",
                got="another process that is writing it now",
                remedy=f"Wait for it, {otherwise}.",
            ) from error
        except FileNotFoundError:
            pass  # as above
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    """What the rename makes visible must be on the disk before it."""
    for path in folder.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
