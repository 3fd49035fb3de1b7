"""A network as one call of the engine sees it: before each run it may stop the call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from svd_engine.backends.network import Network


class InterruptibleNetwork(Network):
    """`check` is called before each run; what it raises ends the call.  The network stays its owner's."""

    def __init__(self, network: Network, check: Callable[[], None]) -> None:
        super().__init__(network.spec, network.placement)
        self.network, self.check = network, check

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.check()
        output = self.network.run(inputs)
        self.placement = self.network.placement  # a swapped one knows it from here on
        return output
