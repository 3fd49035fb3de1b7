"""The contract of every backend: what a `Network` and a `Backend` are.  Knows no backend.

Buffer ownership: inputs stay the caller's and are only read; outputs stay valid until the next call of the
same network, which may write over them, and outlive the network's close.  A caller that keeps an output
beyond the next call clones it.

Memory: `residency` opens, moves and closes networks.  Where `Backend.movable`, a network is opened in host
memory, is called only between `to_device` and `to_host`, and may go back and forth; elsewhere it is opened
on its device, and leaves it when it is closed.

Threads: networks and backends are called by one thread at a time.  `VideoEngine` sees to that; whoever
uses them directly does so himself, and reads an output before the next call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from svd_engine.errors import TensorMismatch
from svd_engine.spec.tensors import NetworkSpec

OnPart = Callable[[int, int], None]  # (parts of a run that are done, parts of the run)


def unheard(_done: int, _parts: int) -> None:
    """The `OnPart` of a run that nobody follows."""


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

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Runs it: outputs by name, in the table's order.

        Raises TensorMismatch for a wrong name, dtype, shape or device of an input, in this order.
        """
        check_inputs(self.spec, inputs, self.placement.device)
        return self.run(inputs)

    def call_in_parts(self, on_part: OnPart, **inputs: Tensor) -> dict[str, Tensor]:
        """As a call, which tells `on_part` how far it is: see `run_in_parts`."""
        check_inputs(self.spec, inputs, self.placement.device)
        return self.run_in_parts(inputs, on_part)

    @abstractmethod
    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The call itself, on checked inputs."""

    def run_in_parts(self, inputs: Mapping[str, Tensor], on_part: OnPart) -> dict[str, Tensor]:
        """As `run`; `on_part` is told of each part, of which most runs have one; what it raises ends it."""
        outputs = self.run(inputs)
        on_part(1, 1)
        return outputs

    def input_buffer(self, name: str) -> Tensor:
        """Zeros in the shape of an input, to fill and pass: of a network with buffers of its own it is that
        one, whose call then copies nothing."""
        spec = next(tensor for tensor in self.spec.inputs if tensor.name == name)
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self.placement.device)

    def to_device(self) -> None:
        """Brings the weights to the device; does nothing where they lie there from the start."""

    def offload(self) -> None:
        """Brings the weights block by block in every call, until `to_host`; asked as that is."""
        raise NotImplementedError(f"{self.spec.key}: {type(self).__name__} has no blocks that move")

    def to_host(self) -> None:
        """Frees the device of the weights; asked only of networks of a backend that is `movable`."""

    @property
    def needs_warm_up(self) -> bool:
        """Whether the next call would do more than compute: compile kernels, say."""
        return False

    def warm_up(self) -> None:
        """Does that now, so that no call is taken for slow.  By default there is nothing to do."""

    def close(self) -> None:
        """Frees what the network holds.  It is not called again after."""


class Backend(Protocol):
    """Opens networks.  `name` is what users ask for; `device` is where inputs must lie.

    movable: networks are opened in host memory, and move to the device and back.
    """

    name: str
    device: torch.device
    movable: bool

    def open(self, spec: NetworkSpec) -> Network: ...

    def close(self) -> None: ...


class StreamsWeights(Backend, Protocol):
    """A backend that can leave weights in host memory, from where they come in every call."""

    def open_streaming(self, spec: NetworkSpec, held_bytes: int) -> Network:
        """As `open`, with `held_bytes` on the device for weights that stay and for those in passing."""
        ...


def named_outputs(spec: NetworkSpec, returned: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """What a torch module returned, a tensor or several in the table's order, by name.

    Raises TensorMismatch for another number of tensors.
    """
    tensors = [returned] if isinstance(returned, Tensor) else list(returned)
    names = [tensor.name for tensor in spec.outputs]
    if len(tensors) != len(names):
        raise TensorMismatch(
            f"outputs of {spec.key}",
            expected=", ".join(names),
            got=f"{len(tensors)} tensors",
            remedy="Return a tensor for each output of the network's table.",
        )
    return dict(zip(names, tensors, strict=True))


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
