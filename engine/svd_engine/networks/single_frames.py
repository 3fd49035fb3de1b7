"""Work on single frames, and what an exporter is shown of it: one frame, which stands for all.

A graph of every frame's work is as many times as long as there are frames, and takes as many times as long to
trace.  Under `one_for_all` a network is traced with one frame between two markers, operators of `DOMAIN`:

    ONE_FRAME    [.., F, ..] -> one frame, without that axis
    ALL_FRAMES   a frame -> [.., F, ..]; its attribute `frames` is F

and `svd_export` writes out what lies between them once for each frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

DOMAIN, ONE_FRAME, ALL_FRAMES = "svd_engine", "OneFrame", "AllFrames"
_one_for_all = ContextVar("one_for_all", default=False)


@contextmanager
def one_for_all() -> Iterator[None]:
    """Within it, networks can be traced for ONNX and not run."""
    token = _one_for_all.set(True)
    try:
        yield
    finally:
        _one_for_all.reset(token)


@dataclass(frozen=True)
class SingleFrames:
    """F tensors of one shape, or one that stands for them."""

    each: Sequence[Tensor]
    count: int  # F

    @classmethod
    def of(cls, x: Tensor, axis: int) -> SingleFrames:
        """[.., F, ..] taken apart along `axis`."""
        if not _for_export():
            return cls(x.unbind(axis), x.shape[axis])
        shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
        return cls([_marker(ONE_FRAME, x, {"axis": axis}, shape)], x.shape[axis])

    def map(self, work: Callable[[Tensor], Tensor]) -> SingleFrames:
        return SingleFrames([work(frame) for frame in self.each], self.count)

    def together(self, axis: int) -> Tensor:
        """[.., F, ..], side by side along a new `axis`."""
        if not _for_export():
            return torch.stack(list(self.each), axis)
        (frame,) = self.each
        shape = [*frame.shape[:axis], self.count, *frame.shape[axis:]]
        return _marker(ALL_FRAMES, frame, {"axis": axis, "frames": self.count}, shape)


def _for_export() -> bool:
    return not torch.compiler.is_dynamo_compiling() and _one_for_all.get()  # torch.compile reads no context


def _marker(operator: str, x: Tensor, attributes: dict[str, int], shape: Sequence[int]) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{operator}", [x], dict(attributes), dtype=x.dtype, shape=shape)
