"""A closed terminal, SIGTERM and a closed pipe: nothing half written stays, and a batch goes on."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from svd_engine.cli import console
from svd_engine.cli.main import main
from svd_engine.media import video
from tests.conftest import HEIGHT, WIDTH
from tests.support.commands import call

# What a command does: works, and says what became of it.
WORK = """
import pathlib, sys, time
from svd_engine.cli import console

def work():
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("cleared", flush=True)
        pathlib.Path(sys.argv[1]).write_text("cleared")

console.run(work)
"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), "teal").save(folder / name)
    return folder


@pytest.fixture(autouse=True)
def _ending() -> Iterator[None]:
    """As a shell leaves the two: these tests may run under nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sends a signal to this process while the first video is written, as a terminal or a system would."""
    write = video.WRITERS[".mp4"]

    def send(number: int) -> None:
        def interrupted(pixels: Any, path: Path, fps: int) -> None:
            path.write_bytes(b"half a video")
            monkeypatch.setitem(video.WRITERS, ".mp4", write)
            os.kill(os.getpid(), number)
            write(pixels, path, fps)

        monkeypatch.setitem(video.WRITERS, ".mp4", interrupted)

    return send


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_generate_leaves_nothing(
    tiny_bundle: Path, photos: Path, tmp_path: Path, signalled: Callable[[int], None], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    signalled(number)
    options = ("-o", out / "a.mp4", "--report", out / "a.json", "--bundle", tiny_bundle, "--steps", 1)
    assert call(main, "generate", photos / "a.png", *options) == 128 + number
    assert list(out.iterdir()) == []
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_batch_goes_on_where_it_ended(
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    signalled: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    out = tmp_path / "out"
    batch = ("batch", photos, "-o", out, "--bundle", tiny_bundle, "--steps", 1)
    signalled(number)
    assert call(main, *batch) == 128 + number
    assert "2 waiting: the same command goes on with them" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {".batch", "summary.csv", "summary.parquet"}
    assert list((out / ".batch" / "partial").iterdir()) == []
    assert call(main, *batch) == 0
    assert "2 made, 0 failed, 0 kept" in capsys.readouterr().out


def test_after_nohup_a_closed_terminal_ends_nothing(
    tiny_bundle: Path, photos: Path, tmp_path: Path, signalled: Callable[[int], None]
) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled(signal.SIGHUP)
    made = tmp_path / "a.mp4"
    options = ("-o", made, "--bundle", tiny_bundle, "--steps", 1)
    assert call(main, "generate", photos / "a.png", *options) == 0
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert made.stat().st_size > 100


def test_a_thread_of_a_host_program_leaves_its_signals_alone() -> None:
    seen: list[object] = []
    thread = Thread(target=console.run, args=(lambda: seen.append(signal.getsignal(signal.SIGTERM)),))
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """A real one: what is said to it afterwards is no error."""
    ours, theirs = pty.openpty()

    def controlled() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-c", WORK, str(tmp_path / "said")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=controlled, env=environment
    )
    os.close(theirs)
    assert os.read(ours, 5) == b"begun"
    os.close(ours)
    assert process.wait(timeout=30) == 128 + signal.SIGHUP
    assert (tmp_path / "said").read_text() == "cleared"


def test_a_reader_that_has_left(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    """`| head` of what a command says at its end: its videos are whole, and it ends without a traceback."""
    read, write = os.pipe()
    os.close(read)
    made, out = tmp_path / "a.mp4", tmp_path / "out"
    options = ("--bundle", tiny_bundle, "--steps", 1)
    with suppress(BrokenPipeError), open(write, "w") as left, redirect_stdout(left):
        assert call(main, "generate", photos / "a.png", "-o", made, *options) == 1
        assert call(main, "batch", photos, "-o", out, *options) == 1
    assert made.stat().st_size > 100
    assert {path.name for path in out.glob("*.mp4")} == {"a.mp4", "b.mp4"}
    assert "done" in (out / "summary.csv").read_text()
