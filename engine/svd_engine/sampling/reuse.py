"""Which evaluations of the denoiser reuse the feature of an earlier one: see `spec.reuse`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from svd_engine.sampling.preconditioning import c_in
from svd_engine.spec.reuse import Reuse

if TYPE_CHECKING:
    from torch import Tensor


class ReusePolicy:
    """Asked before every evaluation of one call, in their order."""

    def __init__(self, reuse: Reuse) -> None:
        self.reuse = reuse
        self._since_full: int | None = None  # shallow evaluations since; None before the first full one
        self._change = 0.0  # of the scaled input since then
        self._last: Tensor | None = None  # scaled input

    def reuses(self, x: Tensor, sigma: Tensor, possible: bool = True) -> bool:
        """Whether this one may be shallow.  possible: whether there is a feature for it."""
        self._measure(x, sigma)
        threshold = self.reuse.threshold
        shallow = (
            possible
            and self._since_full is not None
            and self._since_full + 1 < self.reuse.interval
            and (threshold is None or self._change < threshold)
        )
        if shallow:
            assert self._since_full is not None
            self._since_full += 1
        else:
            self._since_full, self._change = 0, 0.0
        return shallow

    def _measure(self, x: Tensor, sigma: Tensor) -> None:
        """Adds the relative change since the last evaluation.  Waits for a GPU."""
        if self.reuse.threshold is None:
            return
        scaled = x * c_in(sigma)
        if self._last is not None:
            self._change += float((scaled - self._last).abs().mean() / self._last.abs().mean())
        self._last = scaled
