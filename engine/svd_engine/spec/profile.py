"""The static shapes that one set of networks serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd_engine.spec.bounds import Batch, Frames, Pixels

Guidance = Literal["batched", "single"]


@dataclass(frozen=True)
class Profile:
    """The static shapes that one set of engines serves."""

    frames: Frames
    height: Pixels
    width: Pixels
    batch: Batch = 1  # videos per call
    guidance: Guidance = "batched"  # batched: both CFG halves inside one call; single: one half a call
    decode_chunk: Frames = 14  # frames the decoder takes at once

    @property
    def chunks(self) -> tuple[int, ...]:
        """Frames of each decoder call, in order: equal chunks and what remains.  Sums to `frames`."""
        whole, rest = divmod(self.frames, self.decode_chunk)
        return (self.decode_chunk,) * whole + ((rest,) if rest else ())

    def __str__(self) -> str:
        return (
            f"{self.frames} frames, {self.height}x{self.width}, batch {self.batch}, "
            f"{self.guidance} guidance, decode chunk {self.decode_chunk}"
        )
