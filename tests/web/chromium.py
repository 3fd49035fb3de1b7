"""A browser for the tests: the machine's own Chromium, or Debian's, fetched without root."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.examples import debian

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")


@dataclass(frozen=True)
class Chromium:
    program: Path
    environment: dict[str, str]


def chromium() -> Chromium:
    """Raises `debian.NotHere`."""
    for name in NAMES:
        if found := shutil.which(name):
            return Chromium(Path(found), {})
    usr = debian.program(NAMES[0])
    libraries = sorted({str(file.parent) for file in (usr / "lib").rglob("lib*.so*")})
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    return Chromium(usr / "lib/chromium/chromium-headless-shell", environment)
