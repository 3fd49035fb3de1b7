"""One network in device memory at a time, of whose weights a part stays in host memory: TensorRT's streaming.

That part crosses the bus in every call, as the layers before its own run; a plan's cost counts the time as if
none were hidden.  As much stays on the device as the budget has room for.  Otherwise as `swapped`.  For plans
that were built with weight streaming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from svd_engine.residency.swapped import Swapped
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.network import Backend, Network, StreamsWeights
from svd_engine.spec.tensors import NetworkSpec


class WeightStreaming(Swapped):
    name = "streaming"
    streams = True

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._held: Mapping[str, int] = {}

    @staticmethod
    def held_weights(costs: Sequence[NetworkCost], running: NetworkCost, room: int) -> Mapping[str, int]:  # noqa: ARG004
        least = running.least_weight_bytes
        if least is None or max(room, least) >= running.weight_bytes:
            return running.weights
        (part,) = running.weights  # a plan holds its own
        return {part: max(room, least)}

    @staticmethod
    def streamed_bytes(running: NetworkCost, held: int) -> int:
        """The least that is held is room for weights in passing: none of it counts as a weight that stays."""
        if running.least_weight_bytes is None or held >= running.weight_bytes:
            return 0
        return running.weight_bytes - (held - running.least_weight_bytes)

    def keep_to(self, held: Mapping[str, int]) -> None:
        """Networks that were opened for other amounts are closed, and opened anew by their next call."""
        if held != self._held:
            self._present.clear()
            for network in self._networks.values():
                network.close()
            self._held = held

    def open(self, spec: NetworkSpec) -> Network:
        if spec.key not in self._held:
            return self.backend.open(spec)
        backend = cast(StreamsWeights, self.backend)  # the planner offers this strategy to no other
        return backend.open_streaming(spec, self._held[spec.key])
