"""A UNet whose weights wait in host memory: each block's are brought ahead of its use, and forgotten after.

Two buffers on the device, each as large as the largest block: while one block runs out of the one, the next
block's weights are copied into the other, on a stream of their own.  The order of the blocks is learned from
the first evaluation, which waits for each copy.  What belongs to no block stays on the device.

Exact: the same kernels over the same weights, at other addresses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes, as CUDA's allocator gives


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Resnets, attentions and samplers of the UNet in a denoiser: whatever its forward calls them with, it
    calls each whole."""
    unet: Any = network.get_submodule("unet")
    parts = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    names = ("resnets", "attentions", "downsamplers", "upsamplers")
    return list(chain.from_iterable(getattr(part, name, None) or () for part in parts for name in names))


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Weights and buffers, each once."""
    found = chain.from_iterable(chain(m.parameters(), m.buffers()) for m in modules)
    return list({id(tensor): tensor for tensor in found}.values())


def held_bytes(network: nn.Module) -> int:
    """Weights of a denoiser on the device while its blocks are brought one by one."""
    blocks = blocks_of(network)
    apart = {id(tensor) for tensor in tensors_of(blocks)}
    rest = sum(t.nbytes for t in tensors_of([network]) if id(t) not in apart)
    return rest + 2 * max(map(block_bytes, blocks))


def block_bytes(block: nn.Module) -> int:
    return sum(padded(tensor.nbytes) for tensor in tensors_of([block]))


def padded(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT


class Offloading:
    """Of a denoiser whose weights lie in host memory, from now on until `end`.  Used by one thread at a time.

    device: where it runs.  On a CPU the copies are made at once, in the same order.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.blocks = [WaitingBlock(block, device) for block in blocks_of(network)]
        self.lanes = Lanes(device)
        largest = max(block.count for block in self.blocks)
        self.slots = [Slot(largest, device, self.lanes) for _ in range(2)]
        self.following: dict[WaitingBlock, WaitingBlock] = {}  # in the order of the last evaluation
        self._last: WaitingBlock | None = None
        apart = {id(tensor) for tensor in tensors_of(block.module for block in self.blocks)}
        self._rest = [t for t in tensors_of([network]) if id(t) not in apart]
        for tensor in self._rest:
            tensor.data = tensor.data.to(device)
        self._hooks = [
            hook
            for block in self.blocks
            for hook in (
                block.module.register_forward_pre_hook(lambda *_, block=block: self._enter(block)),
                block.module.register_forward_hook(
                    lambda *_, block=block: self._leave(block), always_call=True
                ),
            )
        ]

    def end(self) -> None:
        """Leaves all weights in host memory, and frees the device."""
        for hook in self._hooks:
            hook.remove()
        for block in self.blocks:
            block.wait()
        for tensor in self._rest:
            tensor.data = tensor.data.to("cpu")
        self.lanes.synchronize()
        self.slots.clear()

    def _enter(self, block: WaitingBlock) -> None:
        slot = self._slot_of(block) or self._bring(block)
        self.lanes.compute_after(slot.arrived)
        block.use(slot.buffer)
        if self._last is not None:
            self.following[self._last] = block
        self._last = block
        if (coming := self.following.get(block)) is not None and self._slot_of(coming) is None:
            self._bring(coming, beside=slot)

    def _leave(self, block: WaitingBlock) -> None:
        block.wait()
        if (slot := self._slot_of(block)) is not None:
            slot.free = self.lanes.computed()

    def _bring(self, block: WaitingBlock, beside: Slot | None = None) -> Slot:
        slot = next(slot for slot in reversed(self.slots) if slot is not beside)
        with self.lanes.copying(after=slot.free):
            slot.buffer[: block.count].copy_(block.host, non_blocking=True)
            slot.arrived = self.lanes.copied()
        slot.block = block
        return slot

    def _slot_of(self, block: WaitingBlock) -> Slot | None:
        return next((slot for slot in self.slots if slot.block is block), None)


class WaitingBlock:
    """A block whose weights lie beside each other in one buffer of host memory, page-locked for a GPU."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.tensors = tensors_of([module])
        self.count = block_bytes(module)
        self.host = self._gathered(pinned=device.type == "cuda")

    def use(self, buffer: Tensor) -> None:
        """Has the weights be those in `buffer`."""
        for tensor, here in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = here

    def wait(self) -> None:
        """Has them be those in host memory."""
        self.use(self.host)

    def _gathered(self, pinned: bool) -> Tensor:
        """The buffer; of a block that was offloaded before, the same one."""
        storage = self.tensors[0].untyped_storage()
        together = {t.untyped_storage().data_ptr() for t in self.tensors} == {storage.data_ptr()}
        waits = storage.device.type == "cpu" and (self.tensors[0].is_pinned() or not pinned)
        if together and waits and storage.nbytes() == self.count:
            return torch.empty(0, dtype=torch.uint8).set_(storage)
        buffer = torch.empty(self.count, dtype=torch.uint8, pin_memory=pinned)
        for tensor, there in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = there.copy_(tensor.data)
        return buffer

    def _views(self, buffer: Tensor) -> Iterator[Tensor]:
        start = 0
        for tensor in self.tensors:
            flat = buffer[start : start + tensor.nbytes].view(tensor.dtype)
            yield flat.as_strided(tensor.shape, dense_stride(tensor))
            start += padded(tensor.nbytes)


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Its own stride where that leaves no gaps, such as of channels beside each other."""
    reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.stride() if reach == tensor.numel() else torch.empty(tensor.shape, device="meta").stride()


class Slot:
    """A buffer on the device, and the block whose weights are in it or on their way."""

    def __init__(self, count: int, device: torch.device, lanes: Lanes) -> None:
        self.buffer = torch.empty(count, dtype=torch.uint8, device=device)
        self.block: WaitingBlock | None = None
        self.free = self.arrived = lanes.computed()  # what the next copy, and the block, have to wait for


class Lanes:
    """A stream for copies beside the computing one, neither of which makes the host wait; a CPU has one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def computed(self) -> torch.cuda.Event | None:
        """When all that was asked for until now has been computed."""
        return torch.cuda.current_stream(self.device).record_event() if self.stream else None

    def copied(self) -> torch.cuda.Event | None:
        return self.stream.record_event() if self.stream else None

    def compute_after(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    @contextmanager
    def copying(self, after: torch.cuda.Event | None) -> Iterator[None]:
        if self.stream is None or after is None:
            yield
            return
        self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            yield

    def synchronize(self) -> None:
        if self.stream is not None:
            torch.cuda.synchronize(self.device)
