"""What the TensorRT backend needs of CUDA: memory, a stream, captured graphs.  All of it is torch's.

The host never waits here but in `capture` and `synchronize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from svd_engine.errors import BackendError

LESS_MEMORY = (
    "Free the GPU's memory, or export a smaller profile "
    "(a smaller decode chunk, single guidance, smaller height and width) and build its plans."
)


def driver_version() -> str:
    """NVIDIA's driver, "580.65.06"; "unknown" where it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no package, or no driver: each says so in its own way
        return "unknown"


class Cuda:
    """One GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def empty(self, what: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer, 256-byte aligned.  Raises BackendError when the GPU has no room for `what`."""
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.cuda.OutOfMemoryError as error:
            raise BackendError(
                f"GPU memory of {self.device}",
                expected=f"room for {what}",
                got=str(error).strip().partition("\n")[0],
                remedy=LESS_MEMORY,
            ) from error

    @contextmanager
    def selected(self) -> Iterator[None]:
        """TensorRT works on the thread's current GPU: makes it this one."""
        with torch.cuda.device(self.device):
            yield

    @contextmanager
    def aside(self) -> Iterator[int]:
        """The handle of a stream that runs after all that torch's current one holds, and before what it
        gets next.  On the default stream TensorRT would wait for the whole GPU in every call."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        yield self.stream.cuda_stream
        current.wait_stream(self.stream)

    def capture(self, launch: Callable[[int], bool]) -> Callable[[], None] | None:
        """Records what `launch` puts on a stream, without running it; None when it returns False.

        What is returned runs it on torch's current stream.  Raises RuntimeError when CUDA cannot record it.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                launched = launch(self.stream.cuda_stream)
        finally:
            torch.cuda.set_stream(current)  # torch's context stays on its stream when the capture cannot end
        return graph.replay if launched else None

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class SharedMemory:
    """One block for the activations of networks that never run at once, as large as the largest needs.

    Nobody else keeps the tensor, so a larger one never stands beside it, and it goes with the last network.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self._needs: WeakKeyDictionary[object, int] = WeakKeyDictionary()
        self._block: Tensor | None = None

    def reserve(self, network: object, size: int) -> None:
        self._needs[network] = size

    def release(self, network: object) -> None:
        del self._needs[network]
        if not self._needs:
            self._free()

    def block(self) -> Tensor:
        """uint8, of the most that was reserved.  Another one than before once that grew.

        Raises BackendError when the GPU has no room.
        """
        size = max(self._needs.values())
        if self._block is None or self._block.nbytes < size:
            self._free()
            self._block = self.cuda.empty("TensorRT's activations", (size,), torch.uint8)
        return self._block

    def _free(self) -> None:
        if self._block is not None:
            self.cuda.synchronize()
            self._block = None
