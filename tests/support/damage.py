"""Copies of bundles, and ways to spoil them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svd_engine.bundle.manifest import MANIFEST


def copy(bundle: Path, into: Path) -> Path:
    return Path(shutil.copytree(bundle, into / "copy"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest as the dictionary that its JSON is."""
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def trust(bundle: Path, name: str) -> None:
    """Makes the manifest agree with the file, so that hash and size find nothing."""
    content = (bundle / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def flip(path: Path, offset: int = -1, mask: int = 1) -> None:
    """Flips bits of one byte; the size stays."""
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


def network(bundle: Path, name: str) -> dict[str, Any]:
    """The manifest's first entry of a network."""
    entries = json.loads((bundle / MANIFEST).read_text())["networks"]
    return next(entry for entry in entries if entry["spec"]["network"] == name)
