"""Several processes of one training run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.paths import ROOT

ENDLESS = """
import torch, workers

def work():
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
    with subprocess.Popen([sys.executable, str(script)], env={"PYTHONPATH": path}) as command:
        process = psutil.Process(command.pid)
        started: list[psutil.Process] = []
        while len(started) < 2:
            assert command.poll() is None
            started = [c for c in process.children() if "spawn_main" in " ".join(c.cmdline())]
        command.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(started, timeout=60)
    assert left == []
