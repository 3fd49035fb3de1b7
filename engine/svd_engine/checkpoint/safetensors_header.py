"""What a safetensors file says of its tensors, read without its data and in bounded memory.

The sizes and places of the data are checked by the safetensors library, which opens the file too; what it
lets pass, or would allow much memory for, is refused before: a header that is too long, a key twice.
"""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svd_engine.errors import CheckpointError

MAX_HEADER_BYTES = 16 * 2**20  # SVD's own is 0.3 MiB


@dataclass(frozen=True)
class Stated:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' code, such as F16


def read_header(file: Path) -> Mapping[str, Stated]:
    """Every tensor by its key.  Raises CheckpointError for what is not a whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        document = json.loads(_header_bytes(file), object_pairs_hook=_without_repeats)
        found = {key: _stated(entry) for key, entry in document.items() if key != "__metadata__"}
        with safe_open(file, "np"):  # not "pt", which would load torch
            return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = str(error) if isinstance(error, (OSError, ValueError)) else "a header of another form"
    except SafetensorError as error:
        got = str(error)
    raise CheckpointError(
        str(file),
        expected="a whole safetensors file",
        got=f"{got} ({_size(file)} bytes)",
        remedy="Download it again; in a git clone, fetch it with git lfs pull.",
    )


def shown(key: str) -> str:
    """A key of a file that may hold anything, as text for a message."""
    return key[:100].encode("unicode_escape").decode()


def _header_bytes(file: Path) -> bytes:
    size = _size(file)
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise ValueError("fewer than the 8 bytes that say how long the header is")
        (length,) = struct.unpack("<Q", first)
        if length > size - 8:
            raise ValueError(f"a header of {length} bytes, which the file does not have")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
        return stream.read(length)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} twice")
    return entries


def _stated(entry: Any) -> Stated:
    shape, dtype = entry["shape"], entry["dtype"]
    if not all(isinstance(side, int) and side >= 0 for side in shape) or not isinstance(dtype, str):
        raise TypeError
    return Stated(tuple(shape), dtype)


def _size(file: Path) -> int:
    return os.stat(file).st_size
