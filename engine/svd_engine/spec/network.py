"""The contract of every backend: what a `Network` and a `Backend` are.  Knows no backend.

Buffer ownership: inputs stay the caller's and are only read; an output stays valid until the next call
of the same network, which may write over it, and outlives the network's close.  A caller that keeps an
output beyond the next call clones it.

Threads: networks and backends are called by one thread at a time.  `VideoEngine` sees to that; whoever
uses them directly does so himself, and reads an output before the next call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from svd_engine.errors import TensorMismatch
from svd_engine.spec.tensors import NetworkSpec


@dataclass(frozen=True)
class Placement:
    """What really runs a network; goes into every report."""

    backend: str
    device: str  # "cpu", "cuda:0"
    dtype: str  # of weights and activations, "float16"; sampler and boundary are always float32
    detail: str = ""  # version and provider, say


class Network(ABC):
    """One network at one static shape, ready to be called with named tensors."""

    def __init__(self, spec: NetworkSpec, placement: Placement) -> None:
        self.spec = spec
        self.placement = placement

    def __call__(self, **inputs: Tensor) -> Tensor:
        """Runs it.  Raises TensorMismatch for a wrong name, dtype, shape or device, in this order."""
        check_inputs(self.spec, inputs, self.placement.device)
        return self.run(inputs)

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The call itself, on checked inputs."""

    @property
    def needs_warm_up(self) -> bool:
        """Whether the next call would do more than compute: compile kernels, say."""
        return False

    def warm_up(self) -> None:
        """Does that now, so that no call is taken for slow.  By default there is nothing to do."""

    def close(self) -> None:
        """Frees what the network holds.  It is not called again after."""


class Backend(Protocol):
    """Opens networks.  `name` is what users ask for; `device` is where inputs must lie."""

    name: str
    device: torch.device

    def open(self, spec: NetworkSpec) -> Network: ...

    def close(self) -> None: ...


def check_inputs(spec: NetworkSpec, inputs: Mapping[str, Tensor], device: str) -> None:
    wanted = {tensor.name: tensor for tensor in spec.inputs}
    if wanted.keys() != inputs.keys():
        raise TensorMismatch(
            f"inputs of {spec.key}",
            expected=", ".join(wanted),
            got=", ".join(inputs) or "none",
            remedy="Pass exactly the named tensors of the network's table.",
        )
    for name, tensor in wanted.items():
        given = inputs[name]
        dtype = str(given.dtype).removeprefix("torch.")
        if dtype != tensor.dtype or tuple(given.shape) != tensor.shape:
            raise TensorMismatch(
                f"input {name!r} of {spec.key}",
                expected=f"{tensor.dtype} {list(tensor.shape)}",
                got=f"{dtype} {list(given.shape)}",
                remedy="Convert the tensor, or open the network at this shape.",
            )
        if given.device != torch.device(device):
            raise TensorMismatch(
                f"input {name!r} of {spec.key}",
                expected=f"a tensor on {device}",
                got=f"one on {given.device}",
                remedy=f"Move it with .to({device!r}).",
            )
