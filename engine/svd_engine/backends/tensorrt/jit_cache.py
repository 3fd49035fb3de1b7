"""Where the kernels that TensorRT for RTX compiles on this card are kept between runs: files, no TensorRT.

One file for each plan, GPU, driver and version, in the user's own cache folder.  Kernels are code, so a file
begins with a hash of the rest; one that does not agree is started anew.  A cache only saves time: whatever
keeps it from being read or written is said, and never ends a run.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from svd_engine.bundle.flavours import Host, slug
from svd_engine.errors import OutputError

MAGIC = b"svd-engine jit cache 1\n"
notices = logging.getLogger("svd_engine.notices")


def default_folder() -> Path:
    """The user's cache folder by the system's own convention: XDG, Library/Caches, or LOCALAPPDATA."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "svd-engine" / "jit"


def check_folder(folder: Path) -> Path:
    """Makes a folder that the user named, and writes there once.  Raises OutputError when it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OutputError(
            f"folder {folder} of the JIT cache",
            expected="a folder that can be written",
            got=str(error),
            remedy="Choose another folder for the JIT cache, or run without one.",
        ) from error


@dataclass(frozen=True)
class JitCache:
    """The kernels of one plan on one card."""

    path: Path

    def read(self) -> bytes:
        """What was kept; nothing when there is none, or when it was damaged, which is said."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            notices.warning("JIT cache %s cannot be read (%s): kernels are compiled anew", self.path, error)
            return b""
        head, kernels = content[: len(MAGIC) + 32], content[len(MAGIC) + 32 :]
        if head != MAGIC + hashlib.sha256(kernels).digest():
            notices.warning("JIT cache %s is damaged: kernels are compiled anew", self.path)
            return b""
        return kernels

    def write(self, kernels: bytes) -> None:
        """Whole or not at all; says so when it cannot."""
        aside = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=self.path.parent)
            aside = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + hashlib.sha256(kernels).digest() + kernels)
            os.replace(aside, self.path)
        except OSError as error:
            notices.warning("JIT cache %s cannot be written: %s", self.path, error)
        finally:
            if aside is not None:
                with suppress(OSError):  # it is gone after the rename
                    aside.unlink()


def cache_of(folder: Path, plan_sha256: str, host: Host, driver: str) -> JitCache:
    """The file of one plan on this host: another plan, GPU, driver or version has another one."""
    parts = (plan_sha256[:16], host.gpu, f"driver{driver}", f"trtrtx{host.version}")
    return JitCache(folder / f"{'-'.join(map(slug, parts))}.jit")
