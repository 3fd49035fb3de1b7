"""A real Triton server on the CPU: installs one, starts it on a model repository, watches its processes.

NVIDIA's package nvidia-pytriton carries the tritonserver binary with the Python backend.  It lives in an
environment of its own, because that server's Python backend needs numpy 1.  What the models import besides
they find, behind that numpy, in this checkout and in the tests' environment, by a .pth file: the backend's
processes do not read PYTHONPATH.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from tests.support.paths import ROOT

ENVIRONMENT = ROOT / "build" / "triton"  # git ignores it; `make clean` removes it
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2")
START_SECONDS = 90


def install() -> Path:
    """The environment's folder, made when it is missing or of other versions.  Raises CalledProcessError."""
    wanted = f"{PACKAGES} {sysconfig.get_path('purelib')} {sys.version}"
    ENVIRONMENT.mkdir(parents=True, exist_ok=True)
    with (ENVIRONMENT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = ENVIRONMENT / "ready"
        if not ready.is_file() or ready.read_text() != wanted:
            ready.unlink(missing_ok=True)
            _make(ENVIRONMENT / "venv")
            ready.write_text(wanted)
    return ENVIRONMENT


def _make(venv: Path) -> None:
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, capture_output=True)
    pip = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, *PACKAGES], check=True, capture_output=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "tested.pth").write_text(f"{ROOT / 'engine'}\n{sysconfig.get_path('purelib')}\n")
    backend = site / "pytriton/tritonserver/backends/python"
    stub = site / f"pytriton/tritonserver/python_backend_stubs/{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(stub / "triton_python_backend_stub", backend)


class Server:
    """tritonserver on `repository`, serving `models` alone, on free ports of this machine."""

    def __init__(self, repository: Path, log: Path, *models: str, options: tuple[str, ...] = ()) -> None:
        venv = install() / "venv"
        site = next(venv.glob("lib/python*/site-packages"))
        self.http, self.grpc, self.metrics = free_ports(3)
        self.log = log
        libraries = (sysconfig.get_config_var("LIBDIR"), site / "nvidia_pytriton.libs")
        environment = {
            **os.environ,
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": str(venv),
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            site / "pytriton/tritonserver/bin/tritonserver",
            f"--model-repository={repository}",
            f"--backend-directory={site / 'pytriton/tritonserver/backends'}",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models),
            f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}",
            "--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1",
            "--metrics-interval-ms=100",
            *options,
        ]  # fmt: skip
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Raises RuntimeError with the log when it ends or is not ready in time."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if self.get("v2/health/ready") == 200:
                return
            time.sleep(0.1)
        raise RuntimeError(f"tritonserver is not ready:\n{self.log.read_text()[-6000:]}")

    def get(self, path: str, post: bool = False) -> int | None:
        """The HTTP status of a path, or None when nothing answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/{path}", b"{}" if post else None)
        try:
            return int(urllib.request.urlopen(request, timeout=60).status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all label sets that hold `labels`."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=60).read().decode()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(w in line for w in wanted))

    def stubs(self) -> list[psutil.Process]:
        """The processes in which the Python models run."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "triton_python_backend_stub" in child.name()]

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
