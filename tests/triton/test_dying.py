"""What the operator sees when something dies: a model that cannot start, a process killed, SIGTERM."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from tests.support import damage
from tests.support.paths import ROOT
from tests.triton.asking import SHORT_CALL, Running, ask, outcomes, request, until
from tests.triton.server import Server


def alive() -> list[str]:
    """What the command that docs/triton.md gives for a liveness probe finds, on the whole machine."""
    lines = (ROOT / "docs/triton.md").read_text().splitlines()
    (command,) = (line.strip().removeprefix("- ") for line in lines if "triton_python_backend_stu[b]" in line)
    found = subprocess.run(
        ["sh", "-c", command.replace("grep -qs", "grep -ls")], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def in_flight(server: Server) -> Running:
    """A long request that its model works on: one that comes after SIGTERM is never answered."""
    (model,) = server.stubs()
    idle = sum(model.cpu_times()[:2])
    running = Running(server, request(num_inference_steps=SHORT_CALL["num_inference_steps"] * 25))
    until(lambda: sum(model.cpu_times()[:2]) > idle + 0.2, "the model to work on it")
    return running


def test_a_damaged_bundle_is_not_served(repository: Path, tritonserver: None, tmp_path: Path) -> None:
    """The model is not ready, and so the server is not; the log says why."""
    spoiled = Path(shutil.copytree(repository, tmp_path / "repository"))
    damage.flip(spoiled / "svd/1/bundle/denoiser.bin")
    with Server(spoiled, tmp_path / "log", "svd", options=("--exit-on-error=false",)) as server:
        while server.get("v2/health/live") != 200:
            assert server.process.poll() is None
            time.sleep(0.1)
        assert server.get("v2/health/ready") == 400
        assert server.get("v2/models/svd/ready") == 400
        assert "file denoiser.bin of bundle" in server.log.read_text()
        with pytest.raises(InferenceServerException, match="no available versions"):
            ask(server, "http", request(**SHORT_CALL))


def test_kill_9_of_the_model_s_process(repository: Path, tritonserver: None, tmp_path: Path) -> None:
    """Its requests end with an error; this server's readiness says nothing of it, the probe of the docs does;
    unloading and loading the model brings it back.
    """
    with Server(repository, tmp_path / "log", "svd", options=("--exit-timeout-secs=2",)) as server:
        server.wait_ready()
        (model,) = server.stubs()
        assert f"/proc/{model.pid}/cmdline" in alive()
        running = in_flight(server)
        model.kill()
        result, error = running.answer()
        assert result is None
        assert "Stub process 'svd_0_0' is not healthy" in str(error)
        with pytest.raises(InferenceServerException, match="Stub process 'svd_0_0' is not healthy"):
            ask(server, "http", request(**SHORT_CALL))
        assert server.get("v2/models/svd/ready") == 200
        assert f"/proc/{model.pid}/cmdline" not in alive()
        for verb in ("unload", "load"):
            assert server.get(f"v2/repository/models/svd/{verb}", post=True) == 200
        assert ask(server, "http", request(**SHORT_CALL)).as_numpy("video") is not None


def test_a_restricted_api_asks_for_its_header(repository: Path, tritonserver: None, tmp_path: Path) -> None:
    """As docs/triton.md closes what clients do not need; requests still go through."""
    closed = "--http-restricted-api=model-repository,shared-memory,model-config,logging,trace:KEY=SECRET"
    assert closed in (ROOT / "docs/triton.md").read_text()
    with Server(repository, tmp_path / "log", "svd", options=(closed,)) as server:
        server.wait_ready()
        for path in ("v2/repository/models/svd/load", "v2/systemsharedmemory/unregister", "v2/logging"):
            assert server.get(path, post=True) == 403
        assert ask(server, "http", request(**SHORT_CALL)).as_numpy("video") is not None


def test_sigterm_with_a_request_in_flight(repository: Path, tritonserver: None, tmp_path: Path) -> None:
    """It is answered, nothing new is taken, and the exit code is 0."""
    with Server(repository, tmp_path / "log", "svd") as server:
        server.wait_ready()
        running = in_flight(server)
        assert running.answers.empty()
        assert sum(outcomes(server).values()) == 0
        server.process.terminate()
        result, error = running.answer()
        assert error is None
        assert result.as_numpy("video") is not None
        assert server.process.wait(60) == 0
        assert server.get("v2/health/live") is None
