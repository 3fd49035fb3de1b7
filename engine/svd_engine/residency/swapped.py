"""One network in memory at a time: for cards that cannot hold all four beside each other.

Wraps a backend that opens networks from files.  A network is opened by its first call and closed when
another one is called, so a video opens each network once, and the next video opens them again.  Torch
modules swap otherwise: they go back to host memory (`networks.modules.Modules`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from svd_engine.spec.network import Backend, Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class SwappedNetwork(Network):
    """`placement` is settled by the first call."""

    def __init__(self, spec: NetworkSpec, backend: SwappedBackend) -> None:
        super().__init__(spec, Placement(backend.name, str(backend.device), dtype="", detail="not opened"))
        self.backend = backend

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        network = self.backend.hold(self.spec)
        self.placement = network.placement
        return network.run(inputs)


class SwappedBackend:
    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.device = backend.name, backend.device
        self._held: Network | None = None

    def open(self, spec: NetworkSpec) -> Network:
        return SwappedNetwork(spec, self)

    def hold(self, spec: NetworkSpec) -> Network:
        """The network of `spec`, opened, and no other.  Raises what the backend's `open` raises."""
        if self._held is None or self._held.spec != spec:
            self._release()
            self._held = self.backend.open(spec)
            self._held.warm_up()
        return self._held

    def close(self) -> None:
        self._release()
        self.backend.close()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
