"""What a network computes in.  Its tensors at the boundary are float32 whatever that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["float32", "float16", "bfloat16"]
DTYPE_OPTIONS: dict[DType, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # as users ask


@dataclass(frozen=True)
class Precision:
    weights: DType  # as they are stored and held
    activations: DType  # what layers compute in and pass on

    @classmethod
    def of(cls, dtype: DType) -> Precision:
        """Weights and activations of one type."""
        return cls(dtype, dtype)

    @property
    def option(self) -> str:
        """What a user asks for to get it: `dtype="fp16"`, `--dtype fp16`."""
        return DTYPE_OPTIONS[self.weights]

    def __str__(self) -> str:
        """The activations' type, which tolerances and reports go by, and another one of the weights."""
        stored = "" if self.weights == self.activations else f" ({self.weights} weights)"
        return f"{self.activations}{stored}"


FLOAT32 = Precision.of("float32")
