"""Runs the commands as users do: `call` in this process, which is fast, `start` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

MAINS = {"svd-engine": "svd_engine.cli.main", "svd-export": "svd_export.cli"}


def call(main: Callable[[], None], *arguments: object) -> int:
    """The exit code of a command's `main`; its streams are for capsys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        try:
            main()
        except SystemExit as done:
            return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def start(command: str, *arguments: object, **env: str) -> subprocess.Popen[str]:
    """`command` in a process of its own, its streams piped as text; `env` is added to the environment."""
    script = f"from {MAINS[command]} import main; main()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**environment, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8", errors="replace",  # a half of a character may stand between two reads
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & leaves it ignored
    )  # fmt: skip
