"""The static shapes that one set of networks serves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from svd_engine.spec.bounds import Batch, Frames, Pixels

GuidanceMode = Literal["batched", "single"]  # both halves of guidance inside one call; one half a call


class ProfileRequest(Protocol):
    """What a profile needs to know of a call; `svd_engine.request.Settings` is one."""

    @property
    def frames(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def decode_chunk_size(self) -> int | None: ...
    @property
    def decoding(self) -> str: ...
    @property
    def guided(self) -> bool: ...


@dataclass(frozen=True)
class Profile:
    """The static shapes that one set of engines serves."""

    frames: Frames
    height: Pixels
    width: Pixels
    batch: Batch = 1  # videos per call
    guidance: GuidanceMode = "batched"
    decode_chunk: Frames = 14  # frames the decoder takes at once

    @classmethod
    def of_request(cls, request: ProfileRequest, videos: int) -> Profile:
        """Exactly what a call asks for, all its videos in one batch; without a chunk, all frames at once.

        A streamed decoder takes all frames too: `decode_chunk_size` is then how many of them it holds.
        """
        chunk = min(request.decode_chunk_size or request.frames, request.frames)
        if request.decoding == "streamed":
            chunk = request.frames
        mode = _mode(request)
        return cls(request.frames, request.height, request.width, videos, mode, chunk)

    @classmethod
    def of_bundle(cls, profiles: Iterable[Profile], request: ProfileRequest) -> Profile | None:
        """The one of a bundle's profiles that does a call, whatever its batch; None when none does.

        Prefers the guidance mode that the call needs, then to decode the most frames at once.
        """
        size = (request.frames, request.height, request.width)
        fitting = [
            p
            for p in profiles
            if (p.frames, p.height, p.width) == size
            and (request.decoding != "whole" or p.decode_chunk == p.frames)
            and (
                request.decoding == "streamed"
                or request.decode_chunk_size is None
                or min(request.decode_chunk_size, p.frames) == p.decode_chunk
            )
        ]
        return min(fitting, key=lambda p: (p.guidance != _mode(request), -p.decode_chunk), default=None)

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


def _mode(request: ProfileRequest) -> GuidanceMode:
    return "batched" if request.guided else "single"
