"""What the TensorRT backend does with torch's CUDA, held on a machine without one: torch.cuda is recorded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from svd_engine.backends.tensorrt.cuda import Cuda, SharedMemory
from svd_engine.errors import BackendError

GPU = torch.device("cuda", 1)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda was asked to do, in order."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: str, handle: int) -> None:
            self.name, self.cuda_stream = name, handle

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def graph(made: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        said.append(f"capture on {stream.name}, {capture_error_mode}")
        yield
        said.append("captured")

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        said.append(f"select {wanted}")
        yield
        said.append("deselect")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"own of {device}", 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"torch's of {device}", 0))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: said.append(f"back to {stream.name}"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(f"synchronize {device}"))
    return said


def test_aside_is_ordered_by_streams_alone(done: list[str]) -> None:
    """After what torch has enqueued, before what it will, on a stream that is not the default one."""
    with Cuda(GPU).aside() as handle:
        done.append(f"launch on {handle}")
    assert done == [
        "own of cuda:1 waits for torch's of cuda:1",
        "launch on 7",
        "torch's of cuda:1 waits for own of cuda:1",
    ]


def test_a_capture_launches_on_the_captured_stream(done: list[str]) -> None:
    def launch(handle: int) -> bool:
        done.append(f"launch on {handle}")
        return True

    replay = Cuda(GPU).capture(launch)
    assert done == [
        "capture on own of cuda:1, thread_local",
        "launch on 7",
        "captured",
        "back to torch's of cuda:1",
    ]
    assert replay is not None
    replay()
    assert done[-1] == "replay"


def test_a_launch_that_failed_gives_no_graph(done: list[str]) -> None:
    assert Cuda(GPU).capture(lambda handle: False) is None


def test_a_capture_that_cannot_end_leaves_torch_on_its_stream(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.graph itself would stay on the captured one."""

    @contextmanager
    def failing(*_: Any, **__: Any) -> Iterator[None]:
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        Cuda(GPU).capture(lambda handle: True)
    assert done == ["back to torch's of cuda:1"]


def test_torch_has_what_is_recorded_here() -> None:
    """The names and arguments that the stand-ins above take."""
    graph = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"stream", "capture_error_mode"} <= graph.keys()
    assert callable(torch.cuda.Stream.wait_stream)
    assert callable(torch.cuda.CUDAGraph.replay)
    assert issubclass(torch.cuda.OutOfMemoryError, RuntimeError)


def test_the_gpu_is_selected_and_waited_for_by_name(done: list[str]) -> None:
    cuda = Cuda(GPU)
    with cuda.selected():
        done.append("work")
    cuda.synchronize()
    assert done == ["select cuda:1", "work", "deselect", "synchronize cuda:1"]


def test_out_of_memory(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(shape: Any, dtype: Any, device: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 86 GiB\nmore")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BackendError) as caught:
        Cuda(GPU).empty("x of denoiser", (2, 3))
    assert caught.value.what == "GPU memory of cuda:1"
    assert caught.value.expected == "room for x of denoiser"
    assert caught.value.got == "CUDA out of memory. Tried to allocate 86 GiB"
    assert "export a smaller profile" in caught.value.remedy


def test_buffers_lie_on_the_gpu(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: asked.append((shape, dtype, device)))
    Cuda(GPU).empty("x", (2, 3))
    Cuda(GPU).empty("block", (8,), torch.uint8)
    assert asked == [((2, 3), torch.float32, GPU), ((8,), torch.uint8, GPU)]


def test_shared_memory_is_as_large_as_the_largest_needs_and_goes_with_the_last(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Owner:
        """A network."""

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: real(shape, dtype=dtype))
    memory = SharedMemory(Cuda(GPU))
    small, medium, large = Owner(), Owner(), Owner()
    memory.reserve(medium, 100)
    memory.reserve(small, 50)
    first = memory.block()
    assert (first.dtype, first.nbytes) == (torch.uint8, 100)
    assert memory.block() is first
    memory.release(small)
    assert memory.block() is first
    assert done == []
    memory.reserve(large, 200)
    assert memory.block().nbytes == 200
    assert done == ["synchronize cuda:1"]
    memory.release(medium)
    assert memory.block().nbytes == 200
    memory.release(large)
    assert done == ["synchronize cuda:1"] * 2
    memory.reserve(small, 10)
    assert memory.block().nbytes == 10


def test_a_network_that_was_dropped_needs_no_memory(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Owner:
        """A network."""

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: real(shape, dtype=dtype))
    memory = SharedMemory(Cuda(GPU))
    kept, dropped = Owner(), Owner()
    memory.reserve(kept, 10)
    memory.reserve(dropped, 1000)
    del dropped
    assert memory.block().nbytes == 10
