"""Eager torch: the reference that every other backend is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from svd_engine.networks.modules import Modules
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class EagerNetwork(Network):
    """`module` gives the module, on its device, at every call: it may have left in between."""

    def __init__(self, spec: NetworkSpec, module: Callable[[], nn.Module], placement: Placement) -> None:
        super().__init__(spec, placement)
        self.module = module

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = self.module()(**inputs)
        return output


class EagerBackend:
    name = "eager"

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.device = modules.device

    def open(self, spec: NetworkSpec) -> Network:
        dtype = str(self.modules.dtype_of(spec)).removeprefix("torch.")
        placement = Placement("eager", str(self.device), dtype, f"torch {torch.__version__}")
        self.modules.network(spec)  # loaded now: what is wrong with the checkpoint shows here
        return EagerNetwork(spec, lambda: self.modules.network(spec), placement)

    def close(self) -> None:
        self.modules.close()
