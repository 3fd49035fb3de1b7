"""Two processes and one place: one wins, the other says so; and what a killed one left is in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.errors import ExportError
from svd_export import placing
from svd_export.file_lock import locked
from svd_export.placing import placed
from tests.export.test_placing import names, refusal, write
from tests.support import commands

WRITER = """
import sys
from pathlib import Path
from svd_export.placing import placed
with placed(Path(sys.argv[1])) as aside:
    (aside / "started").write_text("")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def writing(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing `target`."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_another_process_is_writing(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with writing(target) as other:
        message = refusal(target)
        assert f"output {target}: expected no other export into the same place" in message
        assert "got another process that is writing it now. Wait for it" in message
        assert names(tmp_path / ".new.partial") == ["started"]  # what the other wrote is untouched
        other.communicate("done\n", timeout=60)
    assert names(target) == ["started"]
    assert names(tmp_path) == ["new"]


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "new"
    with writing(target) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=60)
    assert names(tmp_path) == [".new.lock", ".new.partial"]
    (tmp_path / ".new.partial" / "sub").mkdir()
    (tmp_path / ".new.partial" / "sub" / "old").write_text("")
    (tmp_path / ".new.partial" / "link").symlink_to(tmp_path)
    write(target)
    assert names(tmp_path) == ["new"]
    assert names(target) == ["a.txt"]


def test_waiting_for_the_lock_until_the_other_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other finishes between our look at the place and our lock: its result is not replaced."""
    real, target = placing.locked, tmp_path / "new"

    def late(file: Path, wait: bool) -> AbstractContextManager[None]:
        monkeypatch.setattr(placing, "locked", real)
        write(target)
        return real(file, wait=wait)

    monkeypatch.setattr(placing, "locked", late)
    with pytest.raises(ExportError, match="something that exists already"), placed(target):
        raise AssertionError("entered")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["a.txt"]


def test_the_lock_file_goes_while_another_waits_for_it(tmp_path: Path) -> None:
    """Never is a lock held on a file that is gone: of many that want it at once, one has it at a time."""
    inside: list[int] = []

    def enter(number: int) -> None:
        for _ in range(20):
            with locked(tmp_path / "lock", wait=True):
                inside.append(number)
                assert inside == [number]
                inside.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(8)))
    assert names(tmp_path) == []


def test_a_link_in_the_place_of_the_lock(tmp_path: Path) -> None:
    """It is not followed: what it leads to is not made, and the link is left."""
    (tmp_path / ".new.lock").symlink_to(tmp_path / "elsewhere")
    assert "expected room and permission to write there" in refusal(tmp_path / "new")
    assert names(tmp_path) == [".new.lock"]


def test_the_next_writer_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place of our partial folder is free as soon as ours is renamed."""
    real = Path.rename

    def rename(aside: Path, target: Path) -> None:
        real(aside, target)
        aside.mkdir()
        (aside / "theirs").write_text("")

    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path / "new")
    assert names(tmp_path / ".new.partial") == ["theirs"]


def export(checkpoint: Path, target: Path) -> subprocess.Popen[str]:
    """The command itself, at the smallest size."""
    size = ("--frames", 1, "--height", 16, "--width", 16, "--guidance", "single", "--dtype", "fp32")
    return commands.start("svd-export", "onnx", checkpoint, "-o", target, *size)


def wait_until_halfway(process: subprocess.Popen[str], target: Path) -> None:
    while not (target.with_name(f".{target.name}.partial") / "image_encoder.bin").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_ctrl_c_leaves_nothing(smallest_checkpoint: Path, tmp_path: Path) -> None:
    with export(smallest_checkpoint, tmp_path / "bundle") as process:
        wait_until_halfway(process, tmp_path / "bundle")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGINT)
    assert "Traceback" not in out + err
    assert names(tmp_path) == []


def test_an_export_is_killed_and_then_two_want_its_place(smallest_checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL in the first, then two at the same time."""
    target = tmp_path / "bundle"
    with export(smallest_checkpoint, target) as killed:
        wait_until_halfway(killed, target)
        killed.kill()
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".bundle.lock", ".bundle.partial"]

    with export(smallest_checkpoint, target) as one, export(smallest_checkpoint, target) as two:
        ends = [(process.communicate(timeout=300)[1], process.returncode) for process in (one, two)]
    (said, failed), (_, won) = sorted(ends, key=lambda end: -end[1])
    assert (failed, won) == (1, 0), ends
    assert f"error: output {target}: expected " in said
    assert "another process that is writing it now" in said or "something that exists already" in said
    assert names(tmp_path) == ["bundle"]
    with VideoEngine.from_bundle(target, device="cpu") as engine:
        frames = engine(torch.rand(1, 3, 16, 16), num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 1, 3, 16, 16)
