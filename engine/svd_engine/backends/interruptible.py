"""A network as one call of the engine sees it: each run may stop the call, and is told to its observer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from svd_engine.observer import UNOBSERVED, Observer
from svd_engine.spec.network import Network


class InterruptibleNetwork(Network):
    """`check` is called before each run; what it raises ends the call.  The network stays its owner's."""

    def __init__(self, network: Network, check: Callable[[], None], observer: Observer = UNOBSERVED) -> None:
        super().__init__(network.spec, network.placement)
        self.network, self.check, self.observer = network, check, observer

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.check()
        outputs = self.network.run(inputs)
        self.placement = self.network.placement  # a swapped one knows it from here on
        self.observer.on_network_run(self.spec.network)
        return outputs
