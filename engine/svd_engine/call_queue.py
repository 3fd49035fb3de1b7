"""Lets the calls of one engine run one after the other, from any thread, in the order of their arrival.

Knows threads and processes.  Knows nothing of what a call does.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakSet

from svd_engine.errors import BackendError, Cancelled

POLL_SECONDS = 0.05  # how often a waiting call looks at its `cancel`, which cannot wake it


class Cancel(Protocol):
    """What a caller stops its call with: a `threading.Event`, or anything with its `is_set`."""

    def is_set(self) -> bool: ...


@dataclass(eq=False)
class Turn:
    """One call's place in the queue; it runs while it is the first."""

    cancel: Cancel | None
    closes: bool = False  # the turn of a `close`, which no other ends
    waited_ms: float = 0.0
    thread: int = field(default_factory=threading.get_ident)
    ended: str = ""  # why the engine ends this call: nothing, or what happened

    def check(self) -> None:
        """Raises Cancelled when the caller cancelled, BackendError when the engine ended the call."""
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled(
                "call of the engine",
                expected="to run to its end",
                got="its `cancel` set",
                remedy="Call again to make the video from the start.",
            )
        if self.ended:
            raise BackendError(
                "call of the engine",
                expected="an engine that stays open until the call ends",
                got=self.ended,
                remedy="Wait for the calls of other threads before that, or call again.",
            )


class CallQueue:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turns: deque[Turn] = deque()  # the first one runs
        self._process = os.getpid()
        _queues.add(self)

    @property
    def in_opening_process(self) -> bool:
        """Threads and locks of the process that made the queue do not live on in a forked child."""
        return os.getpid() == self._process

    @contextmanager
    def turn(self, cancel: Cancel | None = None, *, closes: bool = False) -> Iterator[Turn]:
        """Waits until every earlier call has ended.  One that `closes` ends those that still wait.

        Raises Cancelled when `cancel` is set before that, BackendError when a later turn closes before
        that, when it is asked for inside the running turn, in a forked child, or while Python exits.
        """
        if not closes:
            self._check_process()
        turn = Turn(cancel, closes)
        try:
            self._join(turn)
            self._wait(turn)
            yield turn
        finally:
            with self._changed:
                if turn in self._turns:
                    self._turns.remove(turn)
                self._changed.notify_all()

    def end_all(self, why: str) -> None:
        """Ends every call before its next network, and waits until the running one has ended."""
        if not self.in_opening_process:
            return
        with self._changed:
            self._end(self._turns, why)
            mine = threading.get_ident()
            self._changed.wait_for(lambda: not self._turns or self._turns[0].thread == mine)

    def _join(self, turn: Turn) -> None:
        with self._changed:
            if self._turns and self._turns[0].thread == turn.thread:
                raise BackendError(
                    "call or close() of the engine",
                    expected="one after the running call",
                    got="one from inside the running call, which would wait for itself",
                    remedy="Let the callback return first, or open a second engine.",
                )
            self._turns.append(turn)
            if turn.closes:
                waiting = list(self._turns)[1:]
                self._end((t for t in waiting if not t.closes), "close() while it waited for its turn")
            if _exiting.is_set():
                self._end([turn], AT_EXIT)

    def _wait(self, turn: Turn) -> None:
        started = time.perf_counter()
        timeout = None if turn.cancel is None else POLL_SECONDS
        with self._changed:
            turn.check()
            while self._turns[0] is not turn:
                self._changed.wait(timeout)
                turn.check()
        turn.waited_ms = (time.perf_counter() - started) * 1e3

    def _end(self, turns: Iterable[Turn], why: str) -> None:
        for turn in turns:
            turn.ended = why
        self._changed.notify_all()

    def _check_process(self) -> None:
        """A child may open its own engine only if its parent had called none: GNU's OpenMP, under torch,
        waits in the child for threads that the parent had started."""
        if not self.in_opening_process:
            raise _forked(
                "engine in a forked process",
                f"a call in the process that opened it ({self._process})",
                f"one in its child {os.getpid()}, where its threads do not exist",
            )
        if _called_in.setdefault("process", os.getpid()) != os.getpid():
            raise _forked(
                "engine opened in a forked process",
                "a parent that had called no engine before the fork",
                f"a child ({os.getpid()}) of one that had, where torch would wait for threads of its parent",
            )


def _forked(what: str, expected: str, got: str) -> BackendError:
    remedy = "Start the child with multiprocessing.get_context('spawn') and open the engine there."
    return BackendError(what, expected=expected, got=got, remedy=remedy)


AT_EXIT = "the end of the Python process"
_called_in: dict[str, int] = {}  # "process": the first that called an engine; its forked children know it
_exiting = threading.Event()
_queues: WeakSet[CallQueue] = WeakSet()


@atexit.register
def _end_calls() -> None:
    """Daemon threads run on while the interpreter and the libraries under them are taken apart."""
    _exiting.set()
    for queue in list(_queues):
        queue.end_all(AT_EXIT)
