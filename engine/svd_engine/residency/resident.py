"""Every network in device memory, from its first use until the engine is closed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svd_engine.residency.contract import Residency
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.network import Network
from svd_engine.spec.tensors import NetworkSpec


class Resident(Residency):
    name = "resident"

    @staticmethod
    def held_weights(costs: Sequence[NetworkCost], running: NetworkCost, room: int) -> Mapping[str, int]:  # noqa: ARG004
        return {part: count for cost in costs for part, count in cost.weights.items()}

    @staticmethod
    def moved_bytes(running: NetworkCost, there_and_back: bool) -> int:  # noqa: ARG004
        return 0

    def _make(self, spec: NetworkSpec) -> Network:
        network = self.backend.open(spec)
        network.to_device()
        return network
