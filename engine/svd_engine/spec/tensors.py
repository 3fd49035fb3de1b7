"""What a network takes and gives: names, shapes and types of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from svd_engine.spec.bounds import Side


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: Annotated[tuple[Side, ...], Field(max_length=8)]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class NetworkSpec:
    """One network at one static shape.  `key` is unique within a bundle and names its file there."""

    network: str
    key: str
    inputs: Annotated[tuple[TensorSpec, ...], Field(max_length=64)]
    output: TensorSpec
