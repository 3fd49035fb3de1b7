"""Writes a folder aside and puts it in its place when it is whole, under a lock.

The folder aside is `.NAME.partial` beside the target, so the last step is one rename.  The lock
`.NAME.lock` says who works there; it goes with the process, so what a killed one left is cleared by the next.
Nothing is renamed or removed while it is open here: Windows would refuse.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import Timeout

from svd_engine.errors import ExportError
from svd_engine.shell import make_folder
from svd_export.file_lock import locked

OTHER_PLACE = "choose another output folder"


@contextmanager
def placed(target: Path) -> Iterator[Path]:
    """Yields an empty folder; when the block ends without error it becomes `target`.

    Raises ExportError when `target` exists, its parent does not, or another process is writing it,
    and when the disk is full or not writable.
    """
    target = target.absolute()
    check_free(target)
    aside = target.with_name(f".{target.name}.partial")
    with _refused(target), _alone(target.with_name(f".{target.name}.lock"), target):
        check_free(target)  # whoever held the lock until now may have finished
        _make_anew(aside)
        try:
            yield aside
            for path in aside.rglob("*"):  # what the rename makes visible must be on the disk before it
                _sync(path)
            check_free(target)
            aside.rename(target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


@contextmanager
def workshop(folder: Path) -> Iterator[Path]:
    """Yields an empty folder inside `folder`, for files that `move_out` takes into it when they are whole.

    It is gone afterwards, whatever happens.  Raises ExportError when another process works there, or when
    the disk is full or not writable.
    """
    aside, lock = folder.absolute() / ".partial", folder.absolute() / ".lock"
    with _refused(folder, "make the folder writable"), _alone(lock, folder, "then run the same command"):
        _make_anew(aside)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def move_out(path: Path, target: Path) -> None:
    """Puts a whole file in its place, over an older one."""
    _sync(path)
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
            remedy="Choose another output folder." if taken else f"Run: {make_folder(parent)}",
        )
    if os.path.lexists(target):
        raise ExportError(
            f"output {target}",
            expected="a name that is free",
            got="something that exists already",
            remedy="Choose another output folder, or remove this one first.",
        )


@contextmanager
def _alone(lock: Path, target: Path, otherwise: str = f"or {OTHER_PLACE}") -> Iterator[None]:
    """No other process works on `target` meanwhile.  Raises ExportError when one does now."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except Timeout as error:
            raise ExportError(
                f"output {target}",
                expected="no other export into the same place",
                got="another process that is writing it now",
                remedy=f"Wait for it, {otherwise}.",
            ) from error
        yield


def _make_anew(folder: Path) -> None:
    """An empty folder; what a killed process left there goes.  Links are not followed, nor removed."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
    folder.mkdir()


def _sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    if path.is_dir():
        if not hasattr(os, "O_DIRECTORY"):
            return  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    else:
        descriptor = os.open(path, os.O_RDWR)  # Windows flushes nothing that is open for reading alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
