"""A network in a process of its own, behind the contract of every network.

Tensors lie in memory that both processes see.  What travels through the pipe is a word that inputs are
there, and one that outputs are.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch import multiprocessing as processes

from svd_engine.errors import BackendError
from svd_engine.spec.network import Backend, Network, Placement
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.torch_state import own_torch_state

CLOSING_SECONDS = 10.0  # that the other process has to end by itself
Tensors = Mapping[str, Tensor]


class OtherProcess:
    """Opens every network in a new process.  On the CPU only, whose memory two processes can share.

    open_backend: what makes the backend there; it travels there by pickle.  The processes end with their
    networks, and with this process, however that ends.
    """

    movable = False

    def __init__(self, name: str, open_backend: Callable[[], Backend]) -> None:
        self.name, self.open_backend = name, open_backend
        self.device = torch.device("cpu")

    def open(self, spec: NetworkSpec) -> Network:
        """Raises what the backend's `open` raises, and BackendError if the process ends meanwhile."""
        return NetworkThere(spec, self.open_backend)

    def close(self) -> None:
        """Processes belong to their networks; nothing else is held."""


class NetworkThere(Network):
    def __init__(self, spec: NetworkSpec, open_backend: Callable[[], Backend]) -> None:
        self.spec = spec
        self.inputs = {t.name: _shared(t.shape, t.dtype) for t in spec.inputs}
        self.outputs = {t.name: _shared(t.shape, t.dtype) for t in spec.outputs}
        context = processes.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        given = (theirs, open_backend, spec, self.inputs, self.outputs, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=given, daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen here
        try:
            super().__init__(spec, self._answer())
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Tensors) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        try:
            self.pipe.send("run")
        except OSError:
            raise self._ended() from None
        self._answer()
        return dict(self.outputs)

    def _answer(self) -> Placement:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Placement)
        return answer

    def _ended(self) -> BackendError:
        self.process.join(CLOSING_SECONDS)
        return BackendError(
            f"process {self.process.pid} of {self.spec.key}",
            expected="it to run until its network is closed",
            got=f"its end, exit code {self.process.exitcode}",
            remedy="Close the engine and call it again; memory may have run out.",
        )

    def close(self) -> None:
        self.pipe.close()  # which ends it
        self.process.join(CLOSING_SECONDS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _shared(shape: tuple[int, ...], dtype: str) -> Tensor:
    made = torch.zeros(shape, dtype=getattr(torch, dtype))
    made.share_memory_()  # in place
    return made


def _serve(
    pipe: Connection,
    open_backend: Callable[[], Backend],
    spec: NetworkSpec,
    inputs: Tensors,
    outputs: Tensors,
    threads: int,
) -> None:
    """The other process: runs the network whenever told, until this one closes the pipe or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both: the first closes the second
    torch.set_num_threads(threads)
    try:
        with own_torch_state():
            network = open_backend().open(spec)
            network.to_device()
            pipe.send(network.placement)
            while pipe.recv():
                for name, tensor in network(**inputs).items():
                    outputs[name].copy_(tensor)
                pipe.send(network.placement)
    except (EOFError, OSError):  # closed
        pass
    except Exception as error:
        pipe.send(error)
