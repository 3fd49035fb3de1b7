"""The manifest of a bundle, written: whole or not at all, and never over what another process added."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from svd_engine import console
from svd_engine.bundle import sha256_of
from svd_engine.manifest import MANIFEST, FileEntry, Manifest, read_manifest


def as_json(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=1) + "\n"


def file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def update_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replaces the manifest by what `change` makes of it as it is now; waits while another process does so.

    Raises BundleError when there is none, OutputError when it cannot be written.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # goes with the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        changed = change(read_manifest(folder))
        console.write_text(folder / MANIFEST, as_json(changed))
        return changed
    finally:
        os.close(lock)
