"""Memory and traffic of networks as a document of `svd-bench compiled` has them, for a planner."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain

from svd_bench.compiled.document import CompiledDocument
from svd_engine.bundle.costs import boundary_bytes, streamed_cost
from svd_engine.errors import SettingsError
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.streaming import SEGMENT, segments_of, streaming_of
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec


class DocumentCosts:
    """Of the networks that documents of `svd-bench compiled` hold, all of one model and one target.

    levels: the decoder's, as `checkpoint.configs.vae_levels` gives them, for streamed decoders.
    """

    def __init__(
        self, documents: Sequence[CompiledDocument], levels: tuple[Sequence[int], int] = ((), 0)
    ) -> None:
        self.levels = levels
        networks = chain.from_iterable(document.networks for document in documents)
        self._figures = {network.network: network.figures for network in networks}

    @property
    def slices(self) -> list[int]:
        """Frames at a time of the streamed decoders that were compiled, the most first."""
        found = (re.fullmatch(rf"{SEGMENT}-.*-streamed(\d+)-00", key) for key in self._figures)
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def __call__(self, spec: NetworkSpec) -> NetworkCost:
        """Raises SettingsError for a network that was not compiled."""
        if isinstance(spec, StreamedSpec):
            return streamed_cost(spec, segments_of(spec, streaming_of(*self.levels, spec.slice_frames)), self)
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
