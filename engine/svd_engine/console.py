"""What the three commands share: how they fail, and how they place the small files that they write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from svd_engine._version import __version__
from svd_engine.errors import OutputError, SvdEngineError


def run(app: Callable[[], object]) -> None:
    """Runs a command: our errors become one line on stderr and the exit code of their class."""
    try:
        app()
    except SvdEngineError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def version_option(asked: bool) -> None:
    if asked:
        print(__version__)
        raise SystemExit(0)


def check_folder(path: Path) -> None:
    """Said before the work starts: the folder of a file to be written must exist.  Raises OutputError."""
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise OutputError(
            f"file {path}",
            expected="a file name in an existing folder",
            got="a folder" if path.is_dir() else f"no folder {path.absolute().parent}",
            remedy="Make the folder first, or choose another path.",
        )


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all.  Raises OutputError."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise OutputError(
            f"file {path}",
            expected="a place that can be written",
            got=str(error),
            remedy="Choose another path, or free space.",
        ) from error
    finally:
        with suppress(OSError):  # it is gone after the rename
            aside.unlink()
