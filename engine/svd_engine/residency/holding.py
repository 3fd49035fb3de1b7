"""What the engines of a process keep in memory between their calls, so that each plans beside the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from weakref import WeakSet

import torch

HeldBytes = Callable[[], int]


class Holding:
    """Weights that one engine keeps in the memory of one device, from one call to the next.

    outside_torch: they lie where torch's allocator does not know of them, as those of ONNX Runtime and
    TensorRT on a GPU do.
    """

    def __init__(self, device: torch.device, outside_torch: bool) -> None:
        self.device, self.outside_torch = device, outside_torch
        self._kept: tuple[object, HeldBytes] | None = None
        with _lock:
            _holdings.add(self)

    def keep(self, what: object, count: HeldBytes) -> None:
        """Another engine's next call counts the bytes, once for the same `what`: that may take seconds."""
        if self._kept is None or self._kept[0] != what:
            self._kept = what, cache(count)

    def release(self) -> None:
        """Nothing is held any more."""
        self._kept = None

    def beside(self) -> frozenset[HeldBytes]:
        """What other engines hold on this device now, each to be counted."""
        return frozenset(count for other in _on(self.device) if other is not self for count in other.counts())

    def counts(self) -> list[HeldBytes]:
        kept = self._kept
        return [] if kept is None else [kept[1]]


_holdings: WeakSet[Holding] = WeakSet()
_lock = threading.Lock()


def unknown_to_torch(device: torch.device) -> int:
    """Bytes that engines hold on a device, and torch's allocator does not know of."""
    return sum(count() for one in _on(device) if one.outside_torch for count in one.counts())


def _on(device: torch.device) -> list[Holding]:
    with _lock:
        return [one for one in _holdings if one.device == device]
