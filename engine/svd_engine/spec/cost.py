"""What one network needs: bytes of memory and floating-point operations, known before it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from svd_engine.spec.tensors import NetworkSpec

Source = Literal["counted", "compiled"]  # from shapes; from what TensorRT's compiler said


@dataclass(frozen=True)
class NetworkCost:
    """One network, and one call of it."""

    weights: Mapping[str, int]  # bytes on the device by what holds them: networks may share
    activation_bytes: int  # at their most, inputs and outputs included
    parked_bytes: int = 0  # activations that wait in host memory, at their most
    moved_bytes: int = 0  # activations, to host memory and back
    operations: int = 0  # floating-point; 0 where nothing is known of them
    traffic_bytes: int = 0  # that kernels read and write, where the compiler says so
    source: Source = "counted"
    loading_bytes: int = 0  # of host memory while weights are loaded there, at least; 0 where they stay
    least_weight_bytes: int | None = None  # on the device where the others stream; None: they cannot

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())


class CostOf(Protocol):
    """Knows the cost of the networks of a checkpoint or of a bundle."""

    def __call__(self, spec: NetworkSpec) -> NetworkCost: ...
