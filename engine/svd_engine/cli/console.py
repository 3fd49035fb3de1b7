"""What the three commands share: how they report errors, and how they write small files."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from svd_engine._version import __version__
from svd_engine.errors import OutputError, SvdEngineError
from svd_engine.shell import quoted

OPTIONS = {  # how a remedy of the library names a setting: the option that sets it
    "VideoEngine.from_bundle": "--bundle",
    "VideoEngine.from_checkpoint": "--checkpoint",
    "backend": "--backend",
    "checkpoint": "--checkpoint",
    "decode_chunk_size": "--decode-chunk-size",
    "decoding": "--decoding",
    "device": "--device",
    "dtype": "--dtype",
    "flavour": "--flavour",
    "exported_lora": "--exported-lora",
    "frames": "--frames",
    "height": "--height",
    "lora_partial": "--lora-partial",
    "memory": "--memory",
    "num_frames": "--frames",
    "target": "--target",
    "variant": "--variant",
    "width": "--width",
    "write": "--no-write",
}
SETTING = re.compile(
    r"""(?P<name>[\w.]+) (?: ="(?P<text>[^"]*)" | =(?P<word>\w+) | \((?P<value>[A-Z]+)\))""", re.X
)


def run(app: Callable[[], object], options: Mapping[str, str] = OPTIONS) -> None:
    """Run a command: print an error of ours as one line on stderr, exit with the code of its class."""
    with _any_name_said():
        try:
            with _ending_in_order():
                app()
        except SvdEngineError as error:
            print(f"error: {worded(error, options)}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None


@contextmanager
def _any_name_said() -> Iterator[None]:
    """A character that a stream cannot take, in the name of a file say, is escaped: no error after the work.

    Windows gives redirected output an encoding of one alphabet; on Linux names may be no text at all.
    """
    streams = [one for one in (sys.stdout, sys.stderr) if isinstance(one, io.TextIOWrapper)]
    strict = [one for one in streams if one.errors == "strict"]
    for stream in strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in strict:
            with suppress(OSError, ValueError):  # whoever read it has gone, or it is closed
                stream.reconfigure(errors="strict")


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """A closed terminal and SIGTERM end the command as Ctrl-C does: what is half written is cleared first.

    The exit code is 128 and the signal's number.  A signal that is ignored, as after nohup, stays so.  What
    is said to a terminal that is gone goes nowhere.  In a host program's other threads, where Python lets
    nobody handle signals, they stay the host's.
    """
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def end(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGTERM:
            with open(os.devnull, "wb") as nowhere:
                for terminal in terminals:
                    os.dup2(nowhere.fileno(), terminal)
        raise SystemExit(128 + number)

    ours = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGHUP") if ours else ()
    ending = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows: one
    ending = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def worded(error: SvdEngineError, options: Mapping[str, str] = OPTIONS) -> str:
    """All of an error's message, with its remedy in the command line's words."""
    return f"{error.problem}. {in_options(error.remedy, options)}"


def in_options(remedy: str, options: Mapping[str, str] = OPTIONS) -> str:
    """Word a library's remedy for the command line: `dtype="bf16"` becomes `--dtype bf16`."""

    def option(setting: re.Match[str]) -> str:
        if setting["name"] not in options:
            return setting[0]
        flag, value = options[setting["name"]], setting["text"] or setting["word"] or setting["value"]
        if value == "None":
            return f"no {flag}"
        return flag if value in ("True", "False") else f"{flag} {quoted(value)}"

    return SETTING.sub(option, remedy)


def version_option(asked: bool) -> None:
    if asked:
        print(__version__)
        raise SystemExit(0)


class _Notices(logging.Handler):
    """To stderr as it is now: a progress bar may have taken its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def show_notices() -> None:
    """What the engine says while it works, such as that it compiles kernels, goes to stderr."""
    notices = logging.getLogger("svd_engine.notices")
    notices.setLevel(logging.INFO)
    notices.propagate = False
    if not notices.handlers:
        notices.addHandler(_Notices())


def check_folder(path: Path, otherwise: str = "choose another path") -> None:
    """Before the work starts: the folder of a file to be written must exist and take files.

    Raises OutputError; `otherwise` ends its remedy.
    """
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir():
        raise OutputError(
            f"file {path}",
            expected="a file name in an existing folder",
            got="a folder" if path.is_dir() else f"no folder {folder}",
            remedy=f"Make the folder first, or {otherwise}.",
        )
    if _is_stream(path):
        raise OutputError(
            f"file {path}",
            expected="a file, which a whole one can take the place of",
            got="a device or a pipe",
            remedy=f"{otherwise[0].upper()}{otherwise[1:]}.",
        )
    try:
        with tempfile.TemporaryFile(dir=folder):  # permission bits do not tell of a read-only disk
            pass
    except OSError as error:
        raise OutputError(
            f"file {path}",
            expected="a folder that can be written",
            got=str(error),
            remedy=f"Make {folder} writable, or {otherwise}.",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all.  Raises OutputError."""
    try:
        with tempfile.TemporaryDirectory(prefix=".svd-engine-", dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_text(text, encoding="utf-8", newline="\n")
            whole.replace(path)
    except OSError as error:
        raise OutputError(
            f"file {path}",
            expected="a place that can be written",
            got=str(error),
            remedy="Choose another path, or free space.",
        ) from error


def _is_stream(path: Path) -> bool:
    """A device, a pipe, or a link such as /dev/stdout, which a rename would put a file in the place of."""
    special = path.exists() and not path.is_file() and not path.is_dir()
    return special or (path.is_symlink() and os.readlink(path).startswith("/proc/"))
