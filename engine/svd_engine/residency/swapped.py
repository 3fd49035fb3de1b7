"""One network in device memory at a time: for cards that cannot hold all four beside each other.

A full and a shallow denoiser, which take turns at every evaluation, count as one.  A call of a network sends
away the one that was there, so a video brings each network once, and the next video brings them again.
Networks of a movable backend wait in host memory; others are opened by their call and closed by another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from svd_engine.residency.contract import Residency
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.network import Backend, Network, OnPart, Placement, unheard
from svd_engine.spec.tensors import NetworkSpec


class Swapped(Residency):
    name = "swapped"

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._present: list[SwappedNetwork] = []  # one, or denoisers that reuse

    @staticmethod
    def held_weights(costs: Sequence[NetworkCost], running: NetworkCost, room: int) -> Mapping[str, int]:  # noqa: ARG004
        return running.weights

    @staticmethod
    def moved_bytes(running: NetworkCost, there_and_back: bool) -> int:
        return running.weight_bytes * (2 if there_and_back else 1)

    def _make(self, spec: NetworkSpec) -> Network:
        return SwappedNetwork(spec, self)

    def bring(self, network: SwappedNetwork) -> Network:
        """The opened network, on the device, and no other there but the one that it takes turns with."""
        if network not in self._present:
            while self._present and not (self._present[-1].spec.kept and network.spec.kept):
                self._present.pop().leave()
            self._present.append(network)
        return network.enter()

    def open(self, spec: NetworkSpec) -> Network:
        """What the backend gives for a network, when it is needed."""
        return self.backend.open(spec)

    def load(self, network: Network) -> None:
        """Brings an opened network to the device."""
        network.to_device()

    def close(self) -> None:
        self._present.clear()
        super().close()


class SwappedNetwork(Network):
    """Of a backend whose networks do not move, `placement` is settled by the first call."""

    def __init__(self, spec: NetworkSpec, owner: Swapped) -> None:
        backend = owner.backend
        placement = Placement(backend.name, str(backend.device), str(spec.precision), "not opened")
        super().__init__(spec, placement)
        self.owner = owner
        self._opened: Network | None = None
        self._is_present = False  # on the device
        if backend.movable:
            self._open()  # in host memory: what is wrong with its files shows now

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.run_in_parts(inputs, unheard)

    def run_in_parts(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        network = self.owner.bring(self)
        outputs = network.run_in_parts(inputs, on_part)
        self.placement = network.placement  # a streamed decoder's segments are opened by its run
        return outputs

    def enter(self) -> Network:
        """The opened network, on the device.  One that failed half-way is there in part, until `leave`."""
        network = self._opened or self._open()
        if not self._is_present:
            self.owner.load(network)
            network.warm_up()
            self._is_present = True
        return network

    def leave(self) -> None:
        """Frees the device."""
        self._is_present = False
        if self._opened is not None and self.owner.backend.movable:
            self._opened.to_host()
        else:
            self.close()

    def close(self) -> None:
        self._is_present = False
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _open(self) -> Network:
        self._opened = self.owner.open(self.spec)
        self.placement = self._opened.placement
        return self._opened
