"""What networks of torch modules share: where their weights lie."""

from __future__ import annotations

from torch import nn

from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class TorchNetwork(Network):
    """`module` lies where it was loaded until `to_device`; networks of several shapes may share it."""

    def __init__(self, spec: NetworkSpec, module: nn.Module, placement: Placement) -> None:
        super().__init__(spec, placement)
        self.module = module

    def to_device(self) -> None:
        self.module.to(self.placement.device)

    def to_host(self) -> None:
        self.module.to("cpu")
