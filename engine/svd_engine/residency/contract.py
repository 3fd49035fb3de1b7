"""The contract of residency: which networks are in memory when.  A strategy is a class in a file of its own.

A residency is the one owner of its backend's networks: it alone opens, moves and closes them.  Whoever asks
it for one may call that at any time, until `close`; the strategy sees to it that it can run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.network import Backend, Network
from svd_engine.spec.tensors import NetworkSpec


class Residency(ABC):
    """Networks of one backend, each made once and kept until `close`; used by one thread at a time."""

    name: ClassVar[str]
    streams: ClassVar[bool] = False  # whether weights cross the bus in every call of a network

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._networks: dict[str, Network] = {}  # by key

    def network(self, spec: NetworkSpec) -> Network:
        """The network of `spec`, ready to be called.  Raises what the backend's `open` raises."""
        if spec.key not in self._networks:
            self._networks[spec.key] = self._make(spec)
        return self._networks[spec.key]

    @staticmethod
    @abstractmethod
    def held_weights(costs: Sequence[NetworkCost], running: NetworkCost, room: int) -> Mapping[str, int]:
        """Weights on the device while one of a call's networks runs: bytes by what holds them.

        room: bytes that the memory budget leaves for them.
        """

    @staticmethod
    def streamed_bytes(running: NetworkCost, held: int) -> int:  # noqa: ARG004
        """Weights that cross the bus in each call of a network of which `held` bytes are on the device."""
        return 0

    @staticmethod
    @abstractmethod
    def moved_bytes(running: NetworkCost, there_and_back: bool) -> int:
        """Weights that a call of the engine moves for one of its networks, beside what streams."""

    @abstractmethod
    def _make(self, spec: NetworkSpec) -> Network:
        """What is given out for a network: the opened one, or one that opens it when it is called."""

    def keep_to(self, held: Mapping[str, int]) -> None:
        """Told before a call: bytes of weights to keep on the device, of networks whose others stream."""

    def cold(self) -> list[Network]:
        """Those whose next call would do more than compute."""
        return [network for network in self._networks.values() if network.needs_warm_up]

    def close(self) -> None:
        """Closes every network, then the backend.  Networks that are asked for later are opened again."""
        while self._networks:
            self._networks.popitem()[1].close()
        self.backend.close()
