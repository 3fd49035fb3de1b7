"""The manifest of a bundle, written: whole or not at all, and never over what another process added."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from svd_engine.bundle.manifest import MANIFEST, SCHEMA, FileEntry, Manifest, read_manifest
from svd_engine.bundle.reading import sha256_of
from svd_engine.cli import console
from svd_engine.errors import OutputError
from svd_export.file_lock import locked

LOCK = f".{MANIFEST}.lock"


def as_json(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=1) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Into a bundle that is being made, with its schema beside it."""
    console.write_text(folder / SCHEMA, json.dumps(Manifest.model_json_schema(), indent=1) + "\n")
    console.write_text(folder / MANIFEST, as_json(manifest))


def file_entry(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))


def update_manifest(folder: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replaces the manifest by what `change` makes of it as it is now; waits while another process does so.

    Raises BundleError when there is none, OutputError when it cannot be written.
    """
    read_manifest(folder)  # before a lock is made where no bundle is
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / LOCK, wait=True))
        except OSError as error:
            raise OutputError(
                f"file {folder / MANIFEST}",
                expected="a folder that can be written",
                got=str(error),
                remedy="Make the folder writable, or work on a copy of the bundle.",
            ) from error
        changed = change(read_manifest(folder))
        console.write_text(folder / MANIFEST, as_json(changed))
        return changed
