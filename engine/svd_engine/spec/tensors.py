"""What a network takes and gives: names, shapes and types of its tensors, and what it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated

from pydantic import Field

from svd_engine.spec.bounds import Kept, SegmentNumber, Side
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import GuidanceMode

VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a value


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: Annotated[tuple[Side, ...], Field(max_length=8)]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * VALUE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class NetworkSpec:
    """One network at one static shape.

    Of several outputs the first is what the network is for; the others are state for a later call.
    """

    network: str
    key: str  # unique within a bundle; names the network's files there
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=64)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=64)]
    precision: Precision
    guidance: GuidanceMode | None = None  # of a denoiser
    kept: Kept | None = None  # of one that leaves or takes a feature: see `spec.reuse`
    segment: SegmentNumber | None = None  # of a streamed decoder: see `spec.streaming`

    @property
    def table(self) -> str:
        """Its tensors in one line."""
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"


@dataclass(frozen=True)
class StreamedSpec(NetworkSpec):
    """A decoder of all frames of a video that holds the activations of a few at a time.

    Torch modules run it as one network, bundles as a chain of segments: see `spec.streaming`.
    """

    slice_frames: int = 1
