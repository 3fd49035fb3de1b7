"""Peak memory of a call, read in a thread, and freed memory given back between subjects."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from types import TracebackType

from svd_bench.documents.strict import StrictModel
from svd_engine.host_memory import give_back_freed

INTERVAL_S = 0.002


class Peaks(StrictModel):
    """Highest during a call after the first, weights included.  Bytes."""

    host: int | None = None  # resident memory of the process
    driver: int | None = None  # device memory that came into use since before the process used the device
    torch: int | None = None  # of torch's allocator


class PeakSampler:
    """Reads a figure in a thread while its `with` block runs; `peak` is the highest value seen."""

    def __init__(self, read: Callable[[], int], interval_s: float = INTERVAL_S) -> None:
        self.read, self.interval_s = read, interval_s
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self.read())
            if self._stop.wait(self.interval_s):
                self.peak = max(self.peak, self.read())
                return

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()


def release() -> None:
    """Gives freed memory back to device and system, so that the next subject starts as the first did."""
    import torch

    gc.collect()  # the exporter leaves its network in a cycle
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_freed()  # most of a UNet
