"""One engine, several threads: every call gets its own frames, in turn; close() and exit wait for the last
use.  Threads meet at stages, nothing sleeps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.errors import BackendError, Cancelled, SettingsError
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.test_engine import images, seeded
from tests.engine.watching import (
    FAKE_CALL,
    FAKE_NETWORKS,
    PATIENCE,
    Gate,
    Running,
    fake_engine,
    in_queue,
    watched,
)
from tests.support.paths import ROOT

IMAGE = torch.full((1, 3, 64, 128), 0.5)


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def engine(request: pytest.FixtureRequest) -> Iterator[VideoEngine]:
    if request.param == "eager":
        folder = request.getfixturevalue("tiny_checkpoint")
        opened = VideoEngine.from_checkpoint(folder, backend="eager", device="cpu")
    else:
        opened = VideoEngine.from_bundle(request.getfixturevalue("tiny_bundle"), device="cpu")
    watched(opened)
    with opened:
        yield opened


def make(engine: VideoEngine, number: int) -> torch.Tensor:
    """Another image, seed and number of steps for each number."""
    result = engine(
        images(number), HEIGHT, WIDTH, FRAMES, number, generator=seeded(number), output_type="pt",
        decode_chunk_size=2,
    )  # fmt: skip
    frames: torch.Tensor = result.frames
    return frames


# Each its own frames


@pytest.mark.parametrize("threads", [2, 3])
def test_calls_do_not_mix(engine: VideoEngine, threads: int) -> None:
    """Between a network's run and the use of its output every other thread gets as far as it can: to the
    same network, or into the queue.
    """
    numbers = range(1, threads + 1)
    alone = {number: make(engine, number) for number in numbers}
    runs: Counter[int] = Counter()
    done: set[int] = set()
    met = threading.Condition()

    def wait_for_the_others(network: str) -> None:
        me = threading.get_ident()
        runs[me] += 1
        with met:
            while not all(
                t.ident in done or runs[t.ident or 0] >= runs[me] or waits(t.ident) for t in running
            ):
                met.wait(0.002)

    def waits(thread: int | None) -> bool:
        return thread in [turn.thread for turn in list(engine._calls._turns)[1:]]

    def call(number: int) -> torch.Tensor:
        try:
            started.wait(PATIENCE)
            return make(engine, number)
        finally:
            done.add(threading.get_ident())

    started = threading.Barrier(threads)
    backend: Any = engine.backend
    running: list[threading.Thread] = []
    backend.ran = wait_for_the_others
    try:
        with met:
            calls = {number: Running(call, number) for number in numbers}
            running += [c.thread for c in calls.values()]
        together = {number: c.value() for number, c in calls.items()}
    finally:
        backend.ran = lambda network: None
    assert [n for n in numbers if not torch.equal(together[n], alone[n])] == []


def test_the_order_is_that_of_arrival_and_the_report_says_the_wait() -> None:
    engine, backend = fake_engine()
    gate = Gate()
    backend.ran = gate
    order: list[int] = []

    def call(number: int) -> Any:
        def step(_: Any, step: int, __: Any, tensors: Any) -> Any:
            order.append(number)
            return tensors

        return engine(IMAGE, callback_on_step_end=step, **FAKE_CALL)

    calls = []
    for number in range(4):
        calls.append(Running(call, number))
        in_queue(engine, number + 1)
    gate.wait()
    gate.opened.set()
    waits = [c.value().report.waited_ms for c in calls]
    assert order == [number for number in range(4) for _ in range(3)]
    assert waits[0] < waits[1]


def test_what_can_be_refused_is_refused_before_the_wait() -> None:
    engine, backend = fake_engine()
    backend.ran = gate = Gate()
    first = Running(engine, IMAGE, **FAKE_CALL)
    gate.wait()
    with pytest.raises(SettingsError, match="num_inference_steps"):
        engine(IMAGE, num_inference_steps=0)
    gate.opened.set()
    first.value()


# Cancelling


def test_a_waiting_call_is_cancelled_and_the_running_one_is_not() -> None:
    engine, backend = fake_engine()
    alone = engine(IMAGE, generator=seeded(), **FAKE_CALL).frames
    backend.ran = gate = Gate()
    first = Running(engine, IMAGE, generator=seeded(), **FAKE_CALL)
    gate.wait()
    cancel = threading.Event()
    second = Running(engine, IMAGE, cancel=cancel, **FAKE_CALL)
    in_queue(engine, 2)
    cancel.set()
    with pytest.raises(Cancelled, match="call of the engine: expected to run to its end, got its `cancel`"):
        second.value()
    gate.opened.set()
    assert torch.equal(first.value().frames, alone)


@pytest.mark.parametrize("networks", range(len(FAKE_NETWORKS)))
def test_a_running_call_is_cancelled_before_its_next_network(networks: int) -> None:
    engine, backend = fake_engine()
    alone = engine(IMAGE, generator=seeded(), **FAKE_CALL).frames
    cancel = threading.Event()
    ran: list[str] = []

    def after(network: str) -> None:
        ran.append(network)
        if len(ran) == networks:
            cancel.set()

    backend.ran = after
    if networks == 0:
        cancel.set()
    with pytest.raises(Cancelled):
        engine(IMAGE, cancel=cancel, **FAKE_CALL)
    assert ran == FAKE_NETWORKS[:networks]
    again = engine(IMAGE, generator=seeded(), cancel=threading.Event(), **FAKE_CALL).frames
    assert torch.equal(again, alone)


# close()


def test_close_waits_for_the_running_call_and_ends_the_waiting_ones() -> None:
    engine, backend = fake_engine()
    alone = engine(IMAGE, generator=seeded(), **FAKE_CALL).frames
    backend.ran = gate = Gate()
    running = Running(engine, IMAGE, generator=seeded(), **FAKE_CALL)
    gate.wait()
    waiting = Running(engine, IMAGE, **FAKE_CALL)
    in_queue(engine, 2)
    closing = Running(engine.close)
    with pytest.raises(BackendError, match=r"got close\(\) while it waited for its turn. Wait for the calls"):
        waiting.value()
    again = Running(engine.close)  # two at once
    in_queue(engine, 3)
    later = Running(engine, IMAGE, generator=seeded(), **FAKE_CALL)
    in_queue(engine, 4)
    assert closing.thread.is_alive()
    assert backend.open_now
    gate.opened.set()
    assert torch.equal(running.value().frames, alone)
    closing.value()
    again.value()
    assert torch.equal(later.value().frames, alone), "after a close it loads again"
    assert not backend.closed_running
    engine.close()
    engine.close()
    assert backend.open_now == []


def test_a_with_block_left_by_an_error_waits_for_the_call_of_another_thread() -> None:
    engine, backend = fake_engine()
    backend.ran = gate = Gate()

    def leave() -> None:
        with engine:
            gate.wait()
            raise KeyError("the host's own")

    running = Running(engine, IMAGE, **FAKE_CALL)
    leaving = Running(leave)
    in_queue(engine, 2)
    gate.opened.set()
    assert running.value().frames.shape == (1, 5, 3, 64, 128)
    with pytest.raises(KeyError, match="the host's own"):
        leaving.value()
    assert backend.open_now == []
    assert not backend.closed_running


def test_a_network_that_fails_to_close_leaves_the_others_to_the_next_close() -> None:
    engine, backend = fake_engine()
    engine(IMAGE, **FAKE_CALL)
    last = list(engine.residency._networks.values())[-1]
    last.close = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        engine.close()
    engine.close()
    assert backend.open_now == [last.spec.key]


@pytest.mark.parametrize("what", ["call", "close"])
def test_inside_a_callback_the_engine_can_be_neither_called_nor_closed(what: str) -> None:
    engine, _ = fake_engine()

    def step(inner: VideoEngine, step: int, _: Any, tensors: Any) -> Any:
        with pytest.raises(BackendError, match="got one from inside the running call, which would wait"):
            inner.close() if what == "close" else inner(IMAGE, **FAKE_CALL)
        return tensors

    result = engine(IMAGE, callback_on_step_end=step, generator=seeded(), **FAKE_CALL)
    assert torch.equal(result.frames, engine(IMAGE, generator=seeded(), **FAKE_CALL).frames)


def test_an_engine_that_nobody_holds_finishes_its_running_call() -> None:
    engine, backend = fake_engine()
    backend.ran = gate = Gate()
    running = Running(engine, IMAGE, generator=seeded(), **FAKE_CALL)
    gate.wait()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    gate.opened.set()
    other, _ = fake_engine()
    assert torch.equal(running.value().frames, other(IMAGE, generator=seeded(), **FAKE_CALL).frames)
    del running
    gc.collect()
    assert gone() is None


# Processes


def script(text: str, bundle: Path) -> subprocess.CompletedProcess[str]:
    head = f"""
import os, sys, threading, torch
from svd_engine import VideoEngine
from svd_engine.errors import BackendError
engine = VideoEngine.from_bundle({str(bundle)!r}, device="cpu")
def call(**more):
    return engine(torch.rand(1, 3, 32, 32), {HEIGHT}, {WIDTH}, {FRAMES}, output_type="pt", **more)
"""
    command = [sys.executable, "-W", "ignore", "-c", head + text]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_is_told_to_spawn(tiny_bundle: Path) -> None:
    """Its parent's call even runs meanwhile; leaving the `with` block does nothing; nobody hangs."""
    done = script(
        """
def fork(_, step, __, tensors):
    if step == 0:
        child = os.fork()
        if child == 0:
            try:
                with engine:
                    call()
            except BackendError as error:
                print(error, flush=True)
                os._exit(7)
        print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return tensors
result = call(num_inference_steps=2, callback_on_step_end=fork)
print("parent", tuple(result.frames.shape))
""",
        tiny_bundle,
    )
    assert done.returncode == 0, done.stderr
    told, child, parent = done.stdout.splitlines()
    assert told.startswith("engine in a forked process: expected a call in the process that opened it (")
    assert told.endswith("get_context('spawn') and open the engine there.")
    assert (child, parent) == ("child 7", f"parent (1, {FRAMES}, 3, {HEIGHT}, {WIDTH})")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_opens_its_own_engine_only_if_its_parent_called_none(tiny_bundle: Path) -> None:
    """It leaves as multiprocessing's children do, by os._exit: sys.exit may hang or abort in ONNX Runtime."""
    done = script(
        f"""
def in_child():
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        return
    try:
        with VideoEngine.from_bundle({str(tiny_bundle)!r}, device="cpu") as own:
            own(torch.rand(1, 3, 32, 32), {HEIGHT}, {WIDTH}, {FRAMES}, num_inference_steps=1)
        print("made", flush=True)
    except BackendError as error:
        print(error, flush=True)
    os._exit(5)
in_child()
call(num_inference_steps=1)
in_child()
""",
        tiny_bundle,
    )
    assert done.returncode == 0, done.stderr
    made, first, told, second = done.stdout.splitlines()
    assert (made, first, second) == ("made", "5", "5")
    assert told.startswith("engine opened in a forked process: expected a parent that had called no engine")


def test_python_ends_while_a_daemon_thread_calls(tiny_bundle: Path) -> None:
    """The call ends before its next network, and so does every later one."""
    done = script(
        """
begun, ends = threading.Event(), []
engine.set_progress_bar_config(disable=True)
def step(_, step, __, tensors):
    begun.set()
    return tensors
def calls():
    while True:
        try:
            call(num_inference_steps=10**5, callback_on_step_end=step)
        except BackendError as error:
            ends.append(str(error))
            if len(ends) == 2:
                print(*ends, sep="\\n", flush=True)
                said.set()
                threading.Event().wait()
said = threading.Event()
import atexit
threading.Thread(target=calls, daemon=True).start()
begun.wait()
from svd_engine.call_queue import _end_calls
atexit.register(lambda: (_end_calls(), said.wait(100)))
""",
        tiny_bundle,
    )
    assert (done.returncode, done.stderr) == (0, "")
    ended = "call of the engine: expected an engine that stays open until the call ends, got the end of the"
    assert [line.startswith(ended) for line in done.stdout.splitlines()] == [True, True]
