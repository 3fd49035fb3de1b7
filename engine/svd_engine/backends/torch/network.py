"""What networks of torch modules share: where their weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from svd_engine.host_memory import give_back_freed
from svd_engine.networks.offloading import Offloading
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec

OFFLOADED = ", block by block from host memory"  # of a placement


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
        self.offloading: Offloading | None = None

    def to_device(self) -> None:
        self.module.to(self.placement.device)

    def offload(self) -> None:
        """Of a denoiser.  It runs in eager torch, and its placement says so."""
        self.offloading = Offloading(self.module, torch.device(self.placement.device))
        if OFFLOADED not in self.placement.detail:
            detail = f"torch {torch.__version__}{OFFLOADED}"
            self.placement = replace(self.placement, backend="eager", detail=detail)

    def to_host(self) -> None:
        if self.offloading is not None:
            self.offloading.end()
            self.offloading = None
        self.module.to("cpu")

    def close(self) -> None:
        if self.offloading is not None:
            self.offloading.end()
        del self.module
        self.release(self.spec)
        give_back_freed()
