"""Every network in device memory, from its first use until the engine is closed."""

from __future__ import annotations

from svd_engine.residency.contract import Residency
from svd_engine.spec.network import Network
from svd_engine.spec.tensors import NetworkSpec


class Resident(Residency):
    name = "resident"

    def _make(self, spec: NetworkSpec) -> Network:
        network = self.backend.open(spec)
        network.to_device()
        return network
