"""Two threads share one C++ backend: `svd::generate` makes one video at a time."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.examples.conftest import SANITIZERS, Programs


def test_two_threads_do_not_mix_their_videos(programs: Programs, tiny_bundle: Path) -> None:
    done = subprocess.run(
        [programs.checks, "threads", tiny_bundle], env={**os.environ, **SANITIZERS},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0 of 40 videos wrong\n"), done.stderr
