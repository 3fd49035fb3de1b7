"""Memory and operations of a torch network, counted: it runs on torch's meta device, which has no data.

Weights are built from the checkpoint's configs, none are read.  Counted are all tensors that are alive at
once; beside them what a convolution takes to change the order of its pixels in memory.  Kernels that take
more scratch memory, and gaps in an allocator's blocks, are not: `residency.budget` leaves room for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from svd_engine.checkpoint.opening import Checkpoint, Component
from svd_engine.checkpoint.weights import build
from svd_engine.networks.modules import COMPONENT_OF, Modules
from svd_engine.networks.offloading import held_bytes
from svd_engine.networks.rewrites import Rewrite
from svd_engine.networks.streamed_decoder import InPlace, StreamedDecoder
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec, TensorSpec

META = torch.device("meta")


class TorchCosts:
    """Costs of a checkpoint's networks on a kind of device, "cpu" or "cuda"; each is counted once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str,
        without_rewrites: Collection[str],
        rewrites: Sequence[Rewrite],
    ) -> None:
        self.modules = MetaModules(checkpoint, without_rewrites, rewrites)
        self.device = device
        self._known: dict[str, NetworkCost] = {}  # by key

    def __call__(self, spec: NetworkSpec) -> NetworkCost:
        if spec.key not in self._known:
            module = self.modules.network(spec)
            counted = _streamed(module, spec) if isinstance(module, StreamedDecoder) else _whole(module, spec)
            self._known[spec.key] = self._of(spec, module, *counted)
        return self._known[spec.key]

    def _of(
        self, spec: NetworkSpec, module: nn.Module, counts: Counts, parking: CountedParking
    ) -> NetworkCost:
        on_cpu = self.device == "cpu"
        return NetworkCost(
            self._weights(spec, module),
            counts.peak + (parking.most if on_cpu else 0),
            0 if on_cpu else parking.most,
            0 if on_cpu else parking.moved,
            counts.operations,
            loading_bytes=self.modules.loaded_bytes(spec) if on_cpu else 0,
            least_weight_bytes=None if on_cpu or COMPONENT_OF[spec.network] != "unet" else held_bytes(module),
        )

    def _weights(self, spec: NetworkSpec, module: nn.Module) -> Mapping[str, int]:
        """On a GPU a network's own, of denoisers that reuse the UNet's; in host memory those of the component
        that it was loaded with."""
        component, dtype = COMPONENT_OF[spec.network], spec.precision.weights
        if self.device != "cpu":
            return {component if spec.kept else spec.network: bytes_of(module)}
        return {f"{component} {dtype}": bytes_of(self.modules.component(component, spec))}


class MetaModules(Modules):
    """A checkpoint's modules without data, rewritten like those that run."""

    def __init__(
        self, checkpoint: Checkpoint, without_rewrites: Collection[str], rewrites: Sequence[Rewrite]
    ) -> None:
        super().__init__(checkpoint, without_rewrites, rewrites)
        self._loaded: dict[tuple[Component, torch.dtype], int] = {}  # bytes, before rewrites

    def network(self, spec: NetworkSpec) -> nn.Module:
        return nn.Module.to(super().network(spec), META)  # blends too, which rewrites have read by now

    def loaded_bytes(self, spec: NetworkSpec) -> int:
        """Of the component that a network was loaded with, before rewrites."""
        return self._loaded[COMPONENT_OF[spec.network], getattr(torch, spec.precision.weights)]

    def component(self, component: Component, spec: NetworkSpec) -> nn.Module:
        return self._component(component, spec.precision.weights)

    def _load(self, component: Component, dtype: torch.dtype) -> nn.Module:
        module = nn.Module.to(build(component, self.checkpoint.configs[component]), dtype)
        self._loaded[component, dtype] = bytes_of(module)
        for part in module.modules():
            blend = getattr(part, "mix_factor", None)
            if isinstance(blend, nn.Parameter):  # rewrites fold its value into weights
                part.mix_factor = nn.Parameter(torch.zeros(blend.shape, dtype=dtype))
        return module.eval().requires_grad_(False)


def bytes_of(module: nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class CountedParking(InPlace):
    """Counts the frames that wait, and leaves no memory of them where the network runs."""

    def __init__(self) -> None:
        self.most = self.moved = self.waiting = 0  # bytes

    def put(self, frame: Tensor) -> Tensor:
        self._add(frame.nbytes)
        self.moved += frame.nbytes
        stands_for = torch.empty((), dtype=frame.dtype, device=META).expand(frame.shape)
        weakref.finalize(stands_for, self._add, -frame.nbytes)
        return stands_for

    def get(self, parked: Tensor) -> Tensor:
        self.moved += parked.nbytes
        return torch.empty(parked.shape, dtype=parked.dtype, device=META)

    def _add(self, change: int) -> None:
        self.waiting += change
        self.most = max(self.most, self.waiting)


class Counts(TorchDispatchMode):
    """Bytes of all tensors alive at once, and operations, of what runs while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive = self.peak = self.operations = 0
        weights = (*module.parameters(), *module.buffers())  # counted apart: views of them add nothing
        self.known = {weight.untyped_storage()._cdata for weight in weights}

    def hold(self, value: object) -> None:
        """Counts the memory of tensors until it is freed; views add none."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self._add(storage.nbytes())
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address: int, count: int) -> None:
        self.known.remove(address)
        self._add(-count)

    def _add(self, change: int) -> None:
        self.alive += change
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        self.hold(result)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **given, out_val=result)
        if packet is torch.ops.aten.convolution:
            self.peak = max(self.peak, self.alive + reordered_bytes(args[0], args[1], result))
        return result


def reordered_bytes(x: Tensor, weight: Tensor, result: Tensor) -> int:
    """What a convolution may take for its input and output in the order that its kernel likes."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and weight.shape[1] > 1:
        return 0 if x.is_contiguous(memory_format=torch.channels_last) else x.nbytes
    return x.nbytes + result.nbytes


class FusedAttention(TorchFunctionMode):
    """Attention as every device runs it: in one kernel that never holds all scores."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = named["query"], named["key"], named["value"]
        self.counts.operations += (
            2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        )
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _whole(module: nn.Module, spec: NetworkSpec) -> tuple[Counts, CountedParking]:
    counts = Counts(module)
    with torch.no_grad(), FusedAttention(counts), counts:
        held = module(**_inputs(spec.inputs))
    del held
    return counts, CountedParking()


def _streamed(decoder: StreamedDecoder, spec: NetworkSpec) -> tuple[Counts, CountedParking]:
    """Counts a video long enough for all that a slice meets, and stretches what grows with the frames."""
    assert isinstance(spec, StreamedSpec)
    (latent,), (images,) = spec.inputs, spec.outputs
    frames = latent.shape[0]
    few = min(frames, 2 * spec.slice_frames + 3)
    counts, parking = Counts(decoder), CountedParking()
    decoder.parking = parking
    with torch.no_grad(), FusedAttention(counts), counts:
        held = decoder(*_inputs([TensorSpec("latent", (few, *latent.shape[1:]))]).values())
    decoder.parking = None
    output = 4 * prod(images.shape)
    counts.peak = max(counts.peak + output * (frames - few) // frames, 2 * output)  # joined at the end
    counts.operations = counts.operations * frames // few
    parking.most, parking.moved = (-(-count * frames // few) for count in (parking.most, parking.moved))
    del held
    return counts, parking


def _inputs(tensors: Sequence[TensorSpec]) -> dict[str, Tensor]:
    return {t.name: torch.empty(t.shape, device=META, dtype=getattr(torch, t.dtype)) for t in tensors}
