"""A client that changes its mind or dies: the server stops its request, and serves the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.paths import PHOTOGRAPH, ROOT
from tests.triton.asking import LONG_CALL, SHORT_CALL, Running, Stream, ask, counted, outcomes, request, until
from tests.triton.server import Server

CLIENT = ROOT / "examples/python/triton_client.py"
LONG_SET = [f"--set={name}={value[0]}" for name, value in LONG_CALL.items()]


@pytest.fixture(autouse=True)
def still_serves(server: Server) -> Any:
    yield
    for model in ("svd", "svd_stream"):
        assert server.get(f"v2/models/{model}/ready") == 200
    assert ask(server, "http", request(**SHORT_CALL)).as_numpy("video") is not None


def test_while_it_runs(server: Server) -> None:
    before = outcomes(server)
    running = Running(server, request(**LONG_CALL))
    time.sleep(0.5)
    assert running.cancel() == "StatusCode.CANCELLED"
    counted(server, before, cancelled=1)


def test_while_it_waits(server: Server) -> None:
    """It never starts: nothing but the one before it reaches the model."""
    before = outcomes(server)
    first = Running(server, request(**LONG_CALL))
    time.sleep(0.5)
    waiting = Running(server, request(**LONG_CALL))
    pending = "nv_inference_pending_request_count"
    until(lambda: server.metric(pending, model="svd") == 1, "the second in the queue")
    assert waiting.cancel() == "StatusCode.CANCELLED"
    assert first.cancel() == "StatusCode.CANCELLED"
    counted(server, before, cancelled=1)
    until(lambda: server.metric(pending, model="svd") == 0, "an empty queue")


def test_at_a_step(server: Server) -> None:
    before = outcomes(server, "svd_stream")
    stream = Stream(server, request(**LONG_CALL))
    while int(stream.next().as_numpy("step")[0]) < 3:
        pass
    stream.cancel()
    counted(server, before, "svd_stream", cancelled=1)


def test_during_the_decoder(server: Server) -> None:
    """After the only step nothing is left but the decoder, called 100 times here."""
    before = outcomes(server, "svd_stream")
    call = {**LONG_CALL, "num_inference_steps": np.int32([1])}
    stream = Stream(server, request(**call))
    assert stream.next().as_numpy("step").tolist() == [1]
    stream.cancel()
    counted(server, before, "svd_stream", cancelled=1)


def test_after_the_end_and_twice(server: Server) -> None:
    before = outcomes(server)
    ended = Running(server, request(**SHORT_CALL))
    result, error = ended.answer()
    assert error is None
    for _ in range(2):
        ended.call.cancel()
    assert result.as_numpy("video") is not None
    running = Running(server, request(**LONG_CALL))
    time.sleep(0.5)
    running.call.cancel()
    assert running.cancel() == "StatusCode.CANCELLED"
    counted(server, before, done=1, cancelled=1)


def start_client(server: Server, tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    protocol = "http" if "http" in arguments else "grpc"
    port = {"http": server.http, "grpc": server.grpc}[protocol]
    command = [sys.executable, CLIENT, PHOTOGRAPH, "-o", tmp_path / "video.mp4", f"--url=127.0.0.1:{port}"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9", "timeout"])
def test_the_client_leaves(server: Server, tmp_path: Path, how: str) -> None:
    """The example program, while its request runs."""
    before = outcomes(server, "svd_stream")
    arguments = [*LONG_SET, "--progress", *(["--timeout=3"] if how == "timeout" else [])]
    client = start_client(server, tmp_path, *arguments)
    assert client.stderr is not None
    if how != "timeout":
        assert client.stderr.readline().startswith("step 1")
        client.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
    counted(server, before, "svd_stream", cancelled=1)
    assert client.wait(60) == {"Ctrl-C": 130, "kill -9": -signal.SIGKILL, "timeout": 1}[how]
    said = {"Ctrl-C": "cancelled", "kill -9": "", "timeout": "Deadline Exceeded"}[how]
    assert said in client.stderr.read()
    assert not (tmp_path / "video.mp4").exists()


def test_over_http_the_server_does_not_see_its_client_go(server: Server, tmp_path: Path) -> None:
    """A limit of this server, which docs/triton.md states: it reads nothing more of a connection until it
    has answered.  When a newer one cancels here, the sentence there and this test have to go.
    """
    before = outcomes(server)
    call = ["--set=num_frames=25", "--set=num_inference_steps=6"]
    client = start_client(server, tmp_path, "--protocol", "http", "--timeout", "0.3", *call)
    assert client.wait(60) == 1
    counted(server, before, done=1)


@pytest.mark.parametrize(
    "arguments", [("--protocol", "http"), ("--protocol", "grpc"), ("--progress", "--preview", "PREVIEW")]
)
def test_the_example_client_writes_it(server: Server, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    shown = tmp_path / "preview.webp"
    named = [str(shown) if a == "PREVIEW" else a for a in arguments]
    client = start_client(server, tmp_path, *named, "--seed", "7", "--set", "num_inference_steps=6")
    out, err = client.communicate(timeout=60)
    assert (client.returncode, out.strip()) == (0, f"wrote {tmp_path / 'video.mp4'}"), err
    assert (tmp_path / "video.mp4").read_bytes()[4:8] == b"ftyp"
    if "--progress" in arguments:
        assert [f"step {step}" for step in range(1, 7)] == err.splitlines()
        assert shown.read_bytes()[:4] == b"RIFF"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--protocol", "http", "--progress"), 2, "--progress needs gRPC"),
        (("--set", "strength=1"), 2, "expected NAME=VALUE"),
        (("--set", "fps=fast"), 2, "expected NAME=VALUE"),
        (("--set", "num_inference_steps=0"), 1, "error: [StatusCode.INVALID_ARGUMENT] num_inference_steps:"),
        (("--protocol", "http", "--set", "fps=0"), 1, "error: [400] fps: expected a whole number"),
    ],
)
def test_the_example_client_refuses(
    server: Server, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    client = start_client(server, tmp_path, *arguments)
    _, err = client.communicate(timeout=60)
    assert client.returncode == code
    assert message in err
    assert not (tmp_path / "video.mp4").exists()
