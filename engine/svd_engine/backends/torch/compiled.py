"""torch.compile: each network compiled whole, at its static shape, on its first call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from svd_engine.errors import BackendError
from svd_engine.networks.modules import Modules
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.tensors import NetworkSpec


class CompiledNetwork(Network):
    """`fullgraph` makes a graph break an error: half a network left in eager torch would be silent."""

    def __init__(self, spec: NetworkSpec, modules: Modules, placement: Placement) -> None:
        super().__init__(spec, placement)
        self.modules = modules
        self.compiled = torch.compile(modules.network(spec), fullgraph=True, dynamic=False)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        dense = {name: tensor.contiguous() for name, tensor in inputs.items()}  # other strides recompile
        self.modules.network(self.spec)  # its weights, where they were when it was compiled
        try:
            output: Tensor = self.compiled(**dense)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BackendError(
                f"torch.compile of {self.spec.key}",
                expected="one graph that compiles",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                remedy='Use backend="eager"; on the CPU torch.compile also needs a C++ compiler (g++).',
            ) from error
        return output


class CompiledBackend:
    name = "compiled"

    def __init__(self, modules: Modules) -> None:
        self.modules = modules
        self.device = modules.device

    def open(self, spec: NetworkSpec) -> Network:
        dtype = str(self.modules.dtype_of(spec)).removeprefix("torch.")
        placement = Placement("compiled", str(self.device), dtype, f"torch {torch.__version__} inductor")
        return CompiledNetwork(spec, self.modules, placement)

    def close(self) -> None:
        self.modules.close()
