"""torch.compile: each network compiled whole, at its static shape, on its first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.backends.torch.network import TorchNetwork
from svd_engine.errors import BackendError
from svd_engine.networks.modules import Modules
from svd_engine.spec.network import Network, Placement, named_outputs
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec


class CompiledNetwork(TorchNetwork):
    """`fullgraph` makes a graph break an error: half a network left in eager torch would be silent."""

    def __init__(
        self,
        spec: NetworkSpec,
        module: nn.Module,
        placement: Placement,
        release: Callable[[NetworkSpec], None],
    ) -> None:
        super().__init__(spec, module, placement, release)
        self.compiled = torch.compile(module, fullgraph=True, dynamic=False)

    def close(self) -> None:
        del self.compiled
        super().close()

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.offloading is not None:
            return named_outputs(self.spec, self.module(**inputs))
        dense = {name: tensor.contiguous() for name, tensor in inputs.items()}  # other strides recompile
        try:
            returned = self.compiled(**dense)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise BackendError(
                f"torch.compile of {self.spec.key}",
                expected="one graph that compiles",
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                remedy='Use backend="eager"; on the CPU torch.compile also needs a C++ compiler (g++).',
            ) from error
        return named_outputs(self.spec, returned)


class CompiledBackend:
    name = "compiled"

    def __init__(self, modules: Modules, device: torch.device) -> None:
        self.modules = modules
        self.device = device
        self.movable = device.type != "cpu"  # there it would wait in the same memory

    def open(self, spec: NetworkSpec) -> Network:
        """A streamed decoder runs in eager torch, and its placement says so: it is no one graph."""
        if isinstance(spec, StreamedSpec):
            return EagerBackend(self.modules, self.device).open(spec)
        detail = f"torch {torch.__version__} inductor"
        placement = Placement("compiled", str(self.device), str(spec.precision), detail)
        return CompiledNetwork(spec, self.modules.network(spec), placement, self.modules.release)

    def close(self) -> None:
        self.modules.close()
