"""Eager torch: the reference that every other backend is held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svd_engine.backends.torch.network import TorchNetwork
from svd_engine.networks.modules import Modules
from svd_engine.spec.network import Network, OnPart, Placement, named_outputs
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec


class EagerNetwork(TorchNetwork):
    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return named_outputs(self.spec, self.module(**inputs))

    @torch.no_grad()
    def run_in_parts(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        """A streamed decoder has parts."""
        if not isinstance(self.spec, StreamedSpec):
            return super().run_in_parts(inputs, on_part)
        return named_outputs(self.spec, self.module(**inputs, on_part=on_part))


class EagerBackend:
    name = "eager"

    def __init__(self, modules: Modules, device: torch.device) -> None:
        self.modules = modules
        self.device = device
        self.movable = device.type != "cpu"  # there it would wait in the same memory

    def open(self, spec: NetworkSpec) -> Network:
        """Loads the weights: what is wrong with the checkpoint shows here."""
        detail = f"torch {torch.__version__}"
        if isinstance(spec, StreamedSpec):
            detail += f", streamed, {spec.slice_frames} frames at a time"
        placement = Placement("eager", str(self.device), str(spec.precision), detail)
        return EagerNetwork(spec, self.modules.network(spec), placement, self.modules.release)

    def close(self) -> None:
        self.modules.close()
