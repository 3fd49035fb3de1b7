"""What networks of torch modules share: where their weights lie."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from svd_engine.host_memory import give_back_freed
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class TorchNetwork(Network):
    """`module` lies where it was loaded until `to_device`; networks of several shapes may share it.

    release: forgets the weights of a network; those that share them keep them until they are closed.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        module: nn.Module,
        placement: Placement,
        release: Callable[[NetworkSpec], None] = lambda _spec: None,
    ) -> None:
        super().__init__(spec, placement)
        self.module = module
        self.release = release

    def to_device(self) -> None:
        self.module.to(self.placement.device)

    def to_host(self) -> None:
        self.module.to("cpu")

    def close(self) -> None:
        del self.module
        self.release(self.spec)
        give_back_freed()
