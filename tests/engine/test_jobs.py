"""The job service over the fake backend: queue, deadline, progress, cancelling, failures.  Nothing sleeps."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from svd_engine.engine import VideoEngine
from svd_engine.errors import (
    BackendError,
    Cancelled,
    ImageError,
    NonFiniteOutput,
    QueueFull,
    SettingsError,
    WaitedTooLong,
)
from svd_engine.serving.jobs import Job, JobService
from svd_engine.serving.one_video import Status, VideoRequest, must_reopen, status_after, warm_up
from svd_engine.serving.watch import Progress
from tests.engine.test_engine import seeded
from tests.engine.watching import (
    FAKE_CALL,
    FAKE_NETWORKS,
    PATIENCE,
    Gate,
    Running,
    WatchedBackend,
    fake_engine,
)
from tests.support.messages import complete

IMAGE = torch.full((1, 3, 64, 128), 0.5)


def asked(seed: int = 0, preview_every: int = 0, **arguments: Any) -> VideoRequest:
    return VideoRequest(IMAGE, seed, preview_every, {**FAKE_CALL, **arguments})


class Here:
    """A service whose first video waits at `gate`, behind its first network."""

    def __init__(self) -> None:
        self.engine: VideoEngine
        self.backend: WatchedBackend
        self.engine, self.backend = fake_engine()
        self.alone = self.engine(IMAGE, generator=seeded(), **FAKE_CALL).frames
        self.gate = self.backend.ran = Gate()
        self.service = JobService(self.engine, max_queue=2)

    def running(self, **arguments: Any) -> Job:
        job = self.service.submit(asked(**arguments))
        self.gate.wait()
        return job


@pytest.fixture
def here() -> Iterator[Here]:
    made = Here()
    yield made
    made.gate.opened.set()
    made.service.close()


def test_a_job_is_the_engine_s_video(here: Here) -> None:
    job = here.running()
    assert job.status == Status.RUNNING
    here.gate.opened.set()
    made = job.result(PATIENCE)
    assert torch.equal(made.frames, here.alone)
    assert made.report.seeds == [0]
    assert job.status == Status.DONE
    assert here.service.outcomes == {
        Status.DONE: 1, Status.CANCELLED: 0, Status.REFUSED: 0, Status.FAILED: 0, Status.EXPIRED: 0,
    }  # fmt: skip


def test_jobs_are_made_in_the_order_of_their_submission(here: Here) -> None:
    first, second, third = here.running(), *(here.service.submit(asked(seed)) for seed in (1, 2))
    ended: list[Job] = []
    for job in (first, second, third):
        job._future.add_done_callback(lambda _, job=job: ended.append(job))  # type: ignore[misc]
    assert [job.status for job in (first, second, third)] == ["running", "waiting", "waiting"]
    here.gate.opened.set()
    frames = [job.result(PATIENCE).frames for job in (first, second, third)]
    assert ended == [first, second, third]
    assert not torch.equal(frames[1], frames[2])
    assert here.service.outcomes[Status.DONE] == 3


def test_what_the_queue_cannot_hold_is_refused_and_later_taken(here: Here) -> None:
    jobs = [here.running(), here.service.submit(asked()), here.service.submit(asked())]
    with pytest.raises(QueueFull, match="queue of the job service: expected at most 2 waiting") as refusal:
        here.service.submit(asked())
    complete(refusal.value)
    jobs[2].cancel()
    last = here.service.submit(asked())
    here.gate.opened.set()
    assert torch.equal(last.result(PATIENCE).frames, here.alone)


def test_engines_take_turns_and_one_is_in_memory(here: Here) -> None:
    other, backend = fake_engine()
    alone = other(IMAGE, generator=seeded(), **FAKE_CALL).frames
    other.close()
    first = here.running()
    second = here.service.submit(asked(), other)
    third = here.service.submit(asked())
    assert [job.ahead for job in (first, second, third)] == [0, 1, 2]
    assert backend.open_now == []
    opened: list[bool] = []
    backend.ran = lambda network: opened.append(bool(here.backend.open_now))
    here.gate.opened.set()
    assert torch.equal(second.result(PATIENCE).frames, alone)
    assert opened == [False] * len(opened) != []
    assert torch.equal(third.result(PATIENCE).frames, here.alone)
    assert [job.ahead for job in (first, second, third)] == [0, 0, 0]
    assert backend.open_now == []


def test_as_many_as_may_wait_fit_beside_the_first_before_it_runs() -> None:
    """Whether the worker has taken it yet or not, and after other jobs as well."""
    engine, backend = fake_engine()
    with JobService(engine, max_queue=1) as service:
        service.submit(asked()).result(PATIENCE)
        backend.ran = gate = Gate()
        with service._changed:  # the worker cannot take any
            service.submit(asked())
            service.submit(asked())
            with pytest.raises(QueueFull):
                service.submit(asked())
        gate.opened.set()


def test_progress_grows_while_it_runs(here: Here) -> None:
    seen: list[Progress] = []
    job = here.service.submit(asked(num_inference_steps=2))
    here.gate.wait()
    assert job.progress == Progress("image_encoder", step=0, steps=0, network_calls=0)
    here.backend.ran = lambda network: seen.append(job.progress)
    here.gate.opened.set()
    job.result(PATIENCE)
    assert [(now.stage, now.step, now.steps, now.network_calls) for now in seen] == [
        ("vae_encoder", 0, 0, 1), ("denoiser", 0, 0, 2), ("denoiser", 1, 2, 3),
        ("vae_decoder", 2, 2, 4), ("vae_decoder", 2, 2, 5), ("vae_decoder", 2, 2, 6),
    ]  # fmt: skip
    assert [(now.decoded, now.frames) for now in seen[-3:]] == [(0, 0), (2, 5), (4, 5)]
    assert job.progress == Progress(
        "postprocess", step=2, steps=2, evaluation=2, evaluations=2, network_calls=7, decoded=5, frames=5
    )


def test_a_preview_is_there_before_the_end(here: Here) -> None:
    job, without = here.running(preview_every=2), here.service.submit(asked())
    assert job.preview is None
    seen: list[Any] = []
    here.backend.ran = lambda network: seen.append(None if job.preview is None else job.preview.shape)
    here.gate.opened.set()
    job.result(PATIENCE)
    without.result(PATIENCE)
    shape = (5, 8, 16, 3)
    before_the_second_step_ended = len(FAKE_NETWORKS[1:4])
    assert seen[:before_the_second_step_ended] == [None] * before_the_second_step_ended
    assert set(seen[before_the_second_step_ended:]) == {shape}
    assert without.preview is None


# Cancelling


def test_cancelled_while_it_waits_it_never_runs(here: Here) -> None:
    first, second = here.running(), here.service.submit(asked())
    second.cancel()
    assert second.status == Status.CANCELLED
    with pytest.raises(Cancelled, match=r"job: expected to run to its end, got cancel\(\)") as error:
        second.result(0)
    complete(error.value)
    here.gate.opened.set()
    first.result(PATIENCE)
    here.service.close()
    assert here.backend.backend.calls == FAKE_NETWORKS * 2  # type: ignore[attr-defined]  # alone and first
    assert here.service.outcomes[Status.CANCELLED] == 1


def test_cancelled_while_it_runs_no_other_network_runs(here: Here) -> None:
    first, second = here.running(), here.service.submit(asked())
    first.cancel()
    assert first.status == Status.RUNNING
    here.gate.opened.set()
    with pytest.raises(Cancelled):
        first.result(PATIENCE)
    assert first.progress.network_calls == 1
    assert first.status == Status.CANCELLED
    assert torch.equal(second.result(PATIENCE).frames, here.alone)


def test_cancelled_after_its_end_it_keeps_its_result(here: Here) -> None:
    job = here.running()
    here.gate.opened.set()
    job.result(PATIENCE)
    job.cancel()
    assert job.status == Status.DONE
    assert torch.equal(job.result(0).frames, here.alone)
    assert here.service.outcomes[Status.CANCELLED] == 0


def test_a_wait_for_a_result_may_end_and_the_job_goes_on(here: Here) -> None:
    job = here.running()
    with pytest.raises(TimeoutError):
        job.result(0)
    here.gate.opened.set()
    assert torch.equal(job.result(PATIENCE).frames, here.alone)


# The deadline


def test_a_job_that_has_waited_too_long_ends_while_the_one_before_it_runs(here: Here) -> None:
    first = here.running()
    here.service.max_wait = 0.01
    late = here.service.submit(asked())
    with pytest.raises(WaitedTooLong, match=r"job: expected to start within 0\.01 s") as error:
        late.result(PATIENCE)
    complete(error.value)
    assert (first.status, late.status) == ("running", "expired")
    here.service.max_wait = None
    third, fourth = (here.service.submit(asked()) for _ in "34")  # there is room again
    here.gate.opened.set()
    for job in (first, third, fourth):
        assert torch.equal(job.result(PATIENCE).frames, here.alone)
    assert here.service.outcomes == {**dict.fromkeys(here.service.outcomes, 0), "done": 3, "expired": 1}


def test_a_job_that_has_begun_has_no_deadline(here: Here) -> None:
    here.service.max_wait = PATIENCE
    job = here.running()
    assert job._timer is not None
    assert job._timer.finished.is_set()
    job._timer.function(*job._timer.args)  # even if it fires in that moment
    here.gate.opened.set()
    assert torch.equal(job.result(PATIENCE).frames, here.alone)


# Failures


@pytest.mark.parametrize(
    ("error", "status", "reopened"),
    [
        (BackendError("network", expected="a run", got="none", remedy="None."), Status.FAILED, True),
        (RuntimeError("CUDA error: unspecified launch failure"), Status.FAILED, True),
        (SystemExit(3), Status.FAILED, True),
        (NonFiniteOutput("network", expected="numbers", got="NaN", remedy="None."), Status.FAILED, False),
        (SettingsError("fps", expected="1", got="0", remedy="None."), Status.REFUSED, False),
        (ImageError("image", expected="one", got="none", remedy="None."), Status.REFUSED, False),
        (Cancelled("call", expected="an end", got="none", remedy="None."), Status.CANCELLED, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_job_that_fails_leaves_the_service_usable(
    here: Here, error: BaseException, status: Status, reopened: bool
) -> None:
    first, second = here.running(), here.service.submit(asked())
    closed: list[bool] = []

    def fail(network: str) -> None:
        here.backend.ran = lambda network: None
        raise error

    close = here.engine.close
    here.engine.close = lambda: (closed.append(True), close())[1]  # type: ignore[method-assign, func-returns-value]
    here.backend.ran = fail
    here.gate.opened.set()
    with pytest.raises(type(error)) as raised:
        first.result(PATIENCE)
    assert raised.value is error
    assert (first.status, status_after(error), must_reopen(error)) == (status, status, reopened)
    assert torch.equal(second.result(PATIENCE).frames, here.alone)
    assert bool(closed) is reopened
    assert here.service.outcomes == {**dict.fromkeys(here.service.outcomes, 0), "done": 1, status: 1}


def test_an_engine_that_fails_to_close_as_well_is_said_in_the_error(here: Here) -> None:
    job = here.running()
    here.backend.ran = lambda network: 1 / 0  # type: ignore[assignment, return-value]
    here.engine.close = lambda: [][1]  # type: ignore[method-assign]
    here.gate.opened.set()
    with pytest.raises(ZeroDivisionError) as error:
        job.result(PATIENCE)
    assert error.value.__notes__ == ["Closing the engine failed as well: list index out of range"]
    here.backend.ran = lambda network: None
    assert torch.equal(here.service.submit(asked()).result(PATIENCE).frames, here.alone)


def test_bad_settings_are_the_job_s_error(here: Here) -> None:
    here.gate.opened.set()
    job = here.service.submit(asked(fps=0))
    with pytest.raises(SettingsError, match="fps: expected a whole number of at least 1"):
        job.result(PATIENCE)
    assert job.status == Status.REFUSED


def test_a_service_holds_neither_frames_nor_the_tensors_of_an_error(here: Here) -> None:
    held: list[weakref.ref[Any]] = []

    def fail(_: Any, step: int, __: Any, tensors: Any) -> Any:
        held.append(weakref.ref(tensors["latents"]))
        raise KeyError("the host's own")

    here.gate.opened.set()
    failed = here.service.submit(asked(callback_on_step_end=fail))
    with pytest.raises(KeyError):
        failed.result(PATIENCE)
    made = here.service.submit(asked()).result(PATIENCE)
    held.append(weakref.ref(made.frames))
    del made
    assert here.service.submit(asked(fps=0))._future.exception(PATIENCE) is not None  # the worker is past it
    gc.collect()
    assert [reference() for reference in held] == [None, None]


# The end


def test_close_ends_all(here: Here) -> None:
    jobs = [here.running(), here.service.submit(asked()), here.service.submit(asked())]
    closing = Running(here.service.close)
    for job in jobs[1:]:
        with pytest.raises(Cancelled, match=r"got close\(\) of its service"):
            job.result(PATIENCE)
    assert closing.thread.is_alive()
    with pytest.raises(BackendError, match="job service: expected an open one, in the process") as error:
        here.service.submit(asked())
    complete(error.value)
    here.gate.opened.set()
    closing.value()
    with pytest.raises(Cancelled):
        jobs[0].result(0)
    assert [job.status for job in jobs] == [Status.CANCELLED] * 3
    assert not here.service._worker.is_alive()
    here.service.close()
    with pytest.raises(BackendError, match="Make a new JobService"):
        here.service.submit(asked())
    assert torch.equal(here.engine(IMAGE, generator=seeded(), **FAKE_CALL).frames, here.alone)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_is_told(here: Here) -> None:
    here.gate.opened.set()
    child = os.fork()
    if child == 0:
        try:
            here.service.submit(asked())
        except BackendError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_many_threads_submit_and_cancel() -> None:
    """Every job ends, and every end is counted once."""
    engine, _ = fake_engine()
    with JobService(engine, max_queue=100) as service:
        start = threading.Barrier(4)

        def client(number: int) -> list[Job]:
            start.wait(PATIENCE)
            jobs = [service.submit(asked(number, num_inference_steps=1)) for _ in range(5)]
            for job in jobs[::2]:
                job.cancel()
            return jobs

        clients = [Running(client, number) for number in range(4)]
        jobs = [job for each in clients for job in each.value()]
        for job in jobs:
            job._future.exception(PATIENCE)
        counts = service.outcomes
        assert {job.status for job in jobs} <= {Status.DONE, Status.CANCELLED}
        assert counts[Status.DONE] == sum(job.status == Status.DONE for job in jobs) >= 8
        assert counts[Status.DONE] + counts[Status.CANCELLED] == 20


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"max_queue": 0}, "max_queue"),
        ({"max_wait": -1.0}, "max_wait"),
        ({"max_wait": float("nan")}, "max_wait"),
    ],
)
def test_a_service_s_numbers_are_checked(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        JobService(fake_engine()[0], **arguments)


@pytest.mark.parametrize(
    ("arguments", "name"), [({"seed": -1}, "seed"), ({"seed": 0, "preview_every": -1}, "preview_every")]
)
def test_a_request_s_numbers_are_checked(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        VideoRequest(IMAGE, **arguments)


def test_warming_up_runs_every_network() -> None:
    engine, backend = fake_engine()
    warm_up(engine)
    assert set(backend.backend.calls) == set(FAKE_NETWORKS)  # type: ignore[attr-defined]
