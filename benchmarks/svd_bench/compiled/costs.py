"""Memory and traffic of networks as a document of `svd-bench compiled` has them, for a planner."""

from __future__ import annotations

from svd_bench.compiled.document import CompiledDocument
from svd_engine.bundle.costs import boundary_bytes
from svd_engine.errors import SettingsError
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.tensors import NetworkSpec


class DocumentCosts:
    """Of the networks that a document of `svd-bench compiled` holds."""

    def __init__(self, document: CompiledDocument) -> None:
        self.document = document
        self._figures = {network.network: network.figures for network in document.networks}

    def __call__(self, spec: NetworkSpec) -> NetworkCost:
        """Raises SettingsError for a network that was not compiled."""
        if spec.key not in self._figures:
            raise SettingsError(
                f"compiled figures of {spec.key}",
                expected=f"one of {', '.join(self._figures)}",
                got="none",
                remedy="Compile a bundle of this size: svd-bench compiled BUNDLE --target sm89 --out FOLDER",
            )
        figures = self._figures[spec.key]
        return NetworkCost(
            {spec.key: figures.weights_bytes},
            figures.activation_bytes + boundary_bytes(spec),
            traffic_bytes=figures.read_bytes + figures.written_bytes,
            source="compiled",
        )
