"""One network in device memory at a time, and of the denoiser a block or two: for the smallest cards.

Its weights wait in host memory and cross the bus in every evaluation, while other blocks run; a plan's cost
counts that time as if none were hidden.  Otherwise as `swapped`.  For backends whose networks move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svd_engine.residency.swapped import Swapped
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.network import Network
from svd_engine.spec.reuse import SHALLOW

IN_BLOCKS = "denoiser"  # the network that is called many times, and holds most weights


class Offloaded(Swapped):
    name = "offloaded"
    streams = True

    @staticmethod
    def held_weights(costs: Sequence[NetworkCost], running: NetworkCost, room: int) -> Mapping[str, int]:  # noqa: ARG004
        if running.least_weight_bytes is None:
            return running.weights
        return {part: running.least_weight_bytes for part in running.weights}

    @staticmethod
    def streamed_bytes(running: NetworkCost, held: int) -> int:  # noqa: ARG004
        return 0 if running.least_weight_bytes is None else running.weight_bytes

    @staticmethod
    def moved_bytes(running: NetworkCost, there_and_back: bool) -> int:
        if running.least_weight_bytes is None:
            return Swapped.moved_bytes(running, there_and_back)
        return 0

    def load(self, network: Network) -> None:
        if network.spec.network == IN_BLOCKS:
            network.offload()
        elif network.spec.network != SHALLOW:  # whose blocks are those of the full denoiser, which is there
            network.to_device()
