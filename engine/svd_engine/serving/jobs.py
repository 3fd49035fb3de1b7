"""A service that makes one video after the other: submit, watch, preview, cancel, fetch the result.

Knows threads.  Knows no protocol: web pages, nodes and batches stand before it.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from concurrent.futures import Future

import numpy as np

from svd_engine.engine import VideoEngine
from svd_engine.errors import BackendError, Cancelled, QueueFull, SvdEngineError, WaitedTooLong
from svd_engine.output import VideoOutput
from svd_engine.serving.one_video import Status, VideoRequest, make_video, must_reopen, status_after, watch
from svd_engine.serving.watch import Progress
from svd_engine.values import at_least, finite

OUTCOMES: tuple[Status, ...] = tuple(status for status in Status if status.ended)


class Job:
    """One video of a service.  May be asked, cancelled and waited for from any thread."""

    def __init__(self, service: JobService, request: VideoRequest, engine: VideoEngine) -> None:
        self.request, self.engine = request, engine
        self.status = Status.WAITING
        self._service = service
        self._watch = watch(engine, request)
        self._cancelled = threading.Event()
        self._future: Future[VideoOutput] = Future()
        self._timer: threading.Timer | None = None  # of its deadline, while it waits

    @property
    def progress(self) -> Progress:
        return self._watch.progress

    @property
    def ahead(self) -> int:
        """Jobs that come before it.  0 while it runs, and after its end."""
        return self._service._ahead(self)

    @property
    def preview(self) -> np.ndarray | None:
        """The newest preview of the first video, [F,h,w,3] bytes.  None before the first, or without any."""
        return self._watch.preview

    def result(self, timeout: float | None = None) -> VideoOutput:
        """The video.  Waits for it, at most `timeout` seconds: then raises TimeoutError, and the job goes on.

        Raises what ended the job: Cancelled, WaitedTooLong, or what the engine's call raises.
        """
        return self._future.result(timeout)

    def cancel(self) -> None:
        """Ends the job: at once while it waits, or else before the next run of a network or of a slice.

        Does nothing after its end.
        """
        self._service._cancel(self, "cancel()")


class JobService:
    """Makes videos with `engine`, in the order of their submission, in a thread of its own.

    max_queue: jobs that may wait beside the running one.  max_wait: seconds that a job may wait, or None.
    Give it an engine of its own, and close that after the service.  Further engines, given with a job, are
    run in turn with it: the networks of one are in memory at a time.  A job that fails leaves the service
    usable: the engine is closed, and loads its networks anew for the next one.
    """

    def __init__(self, engine: VideoEngine, *, max_queue: int = 8, max_wait: float | None = None) -> None:
        self.engine = engine
        self.max_queue = at_least("max_queue", max_queue, 1)
        self.max_wait = None if max_wait is None else finite("max_wait", max_wait, 0, threading.TIMEOUT_MAX)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._loaded = engine  # the only one whose networks may be in memory; of the worker's thread
        self._closed = False
        self._outcomes = dict.fromkeys(OUTCOMES, 0)
        self._worker = threading.Thread(target=self._work, name="svd_engine.serving.jobs", daemon=True)
        self._worker.start()

    def submit(self, request: VideoRequest, engine: VideoEngine | None = None) -> Job:
        """Queues a video of `engine`, by default the service's own.

        Raises QueueFull, or BackendError after `close()` and in a forked process.
        """
        if not self._worker.is_alive():
            raise _not_open()
        job = Job(self, request, engine or self.engine)
        with self._changed:
            if self._closed:
                raise _not_open()
            if len(self._waiting) + (self._running is not None) > self.max_queue:
                raise QueueFull(
                    "queue of the job service",
                    expected=f"at most {self.max_queue} waiting",
                    got="one more",
                    remedy="Submit it again when a job has ended.",
                )
            if self.max_wait is not None:
                job._timer = threading.Timer(self.max_wait, self._expire, [job, self.max_wait])
                job._timer.daemon = True
                job._timer.start()
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    @property
    def outcomes(self) -> dict[Status, int]:
        """How many jobs have ended so far, by how they ended."""
        with self._changed:
            return dict(self._outcomes)

    def close(self) -> None:
        """Ends every job and waits until the running one has ended.  Does nothing the second time."""
        with self._changed:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify_all()
        for job in jobs:
            self._cancel(job, "close() of its service")
        self._worker.join()

    def __enter__(self) -> JobService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Makes the next video; false once the service is closed.  Holds no frames afterwards."""
        if (job := self._next()) is None:
            return False
        try:
            self._load_only(job.engine)
            result = make_video(job.engine, job.request, job._watch, job._cancelled)
        except BaseException as error:  # whatever it was, the job ends and the next one is made
            self._clean_up_after(error, job.engine)
            self._end(job, status_after(error), error)
        else:
            self._end(job, Status.DONE, result)
        return True

    def _next(self) -> Job | None:
        """Waits for a job; None once the service is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            if self._closed:
                return None
            job = self._running = self._waiting.popleft()
            job.status = Status.RUNNING
            if job._timer is not None:
                job._timer.cancel()
            return job

    def _load_only(self, engine: VideoEngine) -> None:
        """Frees the networks of the engine before, which load anew for its next job."""
        if engine is not self._loaded:
            self._loaded.close()
            self._loaded = engine

    def _ahead(self, job: Job) -> int:
        with self._changed:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def _clean_up_after(self, error: BaseException, engine: VideoEngine) -> None:
        traceback.clear_frames(error.__traceback__)  # they hold the call's tensors
        if must_reopen(error):
            try:
                engine.close()
            except Exception as further:
                error.add_note(f"Closing the engine failed as well: {further}")

    def _cancel(self, job: Job, by: str) -> None:
        job._cancelled.set()
        remedy = "Submit it again to make the video."
        self._end_waiting(
            job, Status.CANCELLED, Cancelled("job", expected="to run to its end", got=by, remedy=remedy)
        )

    def _expire(self, job: Job, seconds: float) -> None:
        error = WaitedTooLong(
            "job",
            expected=f"to start within {seconds:g} s",
            got="other jobs before it for all that time",
            remedy="Submit it again when fewer jobs wait.",
        )
        self._end_waiting(job, Status.EXPIRED, error)

    def _end_waiting(self, job: Job, status: Status, error: SvdEngineError) -> None:
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._end(job, status, error)

    def _end(self, job: Job, status: Status, result: VideoOutput | BaseException) -> None:
        with self._changed:
            job.status = status
            self._outcomes[status] += 1
            if job is self._running:
                self._running = None
        if job._timer is not None:
            job._timer.cancel()
        if isinstance(result, BaseException):
            job._future.set_exception(result)
        else:
            job._future.set_result(result)


def _not_open() -> BackendError:
    return BackendError(
        "job service",
        expected="an open one, in the process that made it",
        got="one that was closed or forked",
        remedy="Make a new JobService.",
    )
