"""Several processes of one training run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.paths import ROOT

ENDLESS = """
import os, pathlib, torch, workers

def work():
    pathlib.Path(f"worker-{os.getpid()}").touch()
    while True:
        workers.average([torch.zeros(1)])

if __name__ == "__main__":
    workers.run(2, work)
"""


def test_workers_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    """Killed, it cannot end them itself; two runs that write one folder would spoil both."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    path = f"{ROOT / 'examples' / 'training'}"
    with subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": path}, cwd=tmp_path) as command:
        started: list[Path] = []
        while len(started) < 2:  # at work: before that they wait for each other
            assert command.poll() is None
            time.sleep(0.05)
            started = list(tmp_path.glob("worker-*"))
        processes = [psutil.Process(int(path.name.removeprefix("worker-"))) for path in started]
        command.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(processes, timeout=60)
    assert left == []
