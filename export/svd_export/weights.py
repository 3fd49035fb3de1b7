"""One file of weights shared by every graph of a network: each distinct tensor is written once.

Tensors are found by content, so graphs of other frame counts or guidance modes add only what really
differs.  Offsets are page-aligned, for runtimes that map the file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

PAGE = 4096
INLINE = 1024  # bytes; smaller tensors stay in the graph


class WeightsFile:
    """Open for writing while a network's graphs are made; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}

    def move_out(self, model: ir.Model) -> None:
        """Replaces the large initializers of `model` by references into this file, flushed."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE or isinstance(tensor, ir.ExternalTensor):
                continue
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._offset(tensor.tobytes()),
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=value.name or "",
                base_dir=self.path.parent,
            )
        self._file.flush()

    def _offset(self, content: bytes) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._offsets:
            self._file.write(b"\0" * (-self._file.tell() % PAGE))
            self._offsets[digest] = self._file.tell()
            self._file.write(content)
        return self._offsets[digest]

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
