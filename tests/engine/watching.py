"""Engines for tests of threads: over the fake backend, or with a backend that tells what has run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from svd_engine import VideoEngine
from svd_engine.backends.choose import Choice
from svd_engine.backends.fake import FakeBackend
from svd_engine.observer import Observer
from svd_engine.residency.resident import Resident
from svd_engine.residency.source import EngineSource
from svd_engine.spec.network import Backend, Network
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tensors import NetworkSpec
from tests.engine.test_pipeline import MODEL, PROFILE


class Stops(Observer):
    """The `cancel` of a call that it watches: set when the decoder has told of itself so many times."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.told: list[tuple[float, int]] = []

    def on_decoding(self, done: float, frames: int) -> None:
        self.told.append((done, frames))

    def is_set(self) -> bool:
        return len(self.told) >= self.after


PATIENCE = 60  # seconds until a test takes a thread for stuck
FAKE_CALL: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
FAKE_NETWORKS = ["image_encoder", "vae_encoder", *["denoiser"] * 3, *["vae_decoder"] * 3]  # of that call


class WatchedBackend:
    """`ran` is called with a network's name between its run and the use of its output.

    `open_now` names what is open; `closed_running` says whether something was closed while a network ran.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.device, self.movable = backend.name, backend.device, backend.movable
        self.ran: Callable[[str], None] = lambda network: None
        self.open_now: list[str] = []
        self.running = 0
        self.closed_running = False

    def open(self, spec: NetworkSpec) -> Network:
        self.open_now.append(spec.key)
        return _Watched(self.backend.open(spec), self)

    def close(self) -> None:
        self.closed_running |= self.running > 0
        self.backend.close()


class _Watched(Network):
    def __init__(self, network: Network, owner: WatchedBackend) -> None:
        super().__init__(network.spec, network.placement)
        self.network, self.owner = network, owner

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.owner.running += 1
        try:
            outputs = self.network.run(inputs)
            self.owner.ran(self.spec.network)
        finally:
            self.owner.running -= 1
        return outputs

    def close(self) -> None:
        self.owner.closed_running |= self.owner.running > 0
        self.owner.open_now.remove(self.spec.key)
        self.network.close()


def watched(engine: VideoEngine) -> WatchedBackend:
    """Puts a WatchedBackend into `engine`, which is closed first."""
    engine.close()
    engine.residency.backend = backend = WatchedBackend(engine.backend)
    return backend


def fake_engine() -> tuple[VideoEngine, WatchedBackend]:
    fake = FakeBackend()
    source = EngineSource(
        name="fake",
        model=MODEL,
        precision=FLOAT32,
        residency=Resident(fake),
        choice=Choice("eager", torch.device("cpu"), "a test"),
        default=PROFILE,
        profile_for=lambda settings, videos: PROFILE,
        rewrites=dict,
        weights=list,
    )
    engine = VideoEngine(source)
    return engine, watched(engine)


class Running:
    """A function in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.result = function(*arguments, **named)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def join(self) -> Running:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "stuck"
        return self

    def value(self) -> Any:
        self.join()
        if self.error is not None:
            raise self.error
        return self.result


class Gate:
    """Holds the first thread that gets to it until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *_: object) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE)


def in_queue(engine: VideoEngine, turns: int) -> None:
    """Returns once so many turns run or wait.  Looks again and again: joining the queue wakes nobody."""
    started = time.monotonic()
    while len(engine._calls._turns) != turns:
        assert time.monotonic() - started < PATIENCE
        time.sleep(0.002)
