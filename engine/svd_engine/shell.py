"""Words of commands that messages advise, as the shell of this system takes them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

WINDOWS = sys.platform == "win32"


def quoted(word: object) -> str:
    """One word of a command, in quotes where the shell needs them."""
    return subprocess.list2cmdline([str(word)]) if WINDOWS else shlex.quote(str(word))


def make_folder(folder: Path) -> str:
    """The command that makes a folder and those above it."""
    return f"mkdir {'' if WINDOWS else '-p '}{quoted(folder)}"
