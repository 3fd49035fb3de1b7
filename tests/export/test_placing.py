"""A folder appears whole or not at all, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from svd_engine.errors import ExportError
from svd_export.placing import check_free, placed

LIMITED = """
import resource, signal, sys
from pathlib import Path
from svd_engine.errors import ExportError
from svd_export.placing import placed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with placed(Path(sys.argv[1])) as aside:
        (aside / "small").write_bytes(b"0" * 1000)
        (aside / "large").write_bytes(b"0" * 2000)
except ExportError as error:
    print(error)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def start(script: str, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(target)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def write(target: Path) -> None:
    with placed(target) as aside:
        (aside / "a.txt").write_text("a")
        assert not target.exists()


def refusal(target: Path) -> str:
    with pytest.raises(ExportError) as caught:
        write(target)
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_a_whole_folder_takes_its_place(tmp_path: Path) -> None:
    write(tmp_path / "new")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("new"))
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("kind", ["file", "folder", "full folder", "link", "dangling link"])
def test_a_place_that_is_taken(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "taken"
    if kind == "file":
        target.write_text("")
    elif "link" in kind:
        target.symlink_to(tmp_path if kind == "link" else tmp_path / "nothing")
    else:
        target.mkdir()
        if kind == "full folder":
            (target / "mine").write_text("")
    before = os.lstat(target)
    message = refusal(target)
    assert f"output {target}: expected a name that is free, got something that exists already" in message
    assert "or remove this one first" in message
    assert os.path.samestat(before, os.lstat(target))
    assert names(tmp_path) == ["taken"]


def test_no_folder_to_write_into(tmp_path: Path) -> None:
    parent = tmp_path / "not there"
    message = refusal(parent / "new")
    assert f"got no folder {parent}" in message
    assert f"mkdir -p '{parent}'" in message
    assert names(tmp_path) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(tmp_path / "file" / "new")
    assert f"got a file {tmp_path / 'file'}" in message
    assert "mkdir" not in message


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 300)
    check_free(target)  # asks only what is there
    assert "expected room and permission to write there, got [Errno 36]" in refusal(target)
    assert names(tmp_path) == []


def fail(target: Path, error: BaseException) -> None:
    with placed(target) as aside:
        (aside / "half").write_text("")
        raise error


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), ValueError("broken"), ExportError("a", expected="b", got="c", remedy="d")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_inside_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        fail(tmp_path / "new", error)
    assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("when", ["writing", "syncing"])
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str) -> None:
    error = OSError(number, os.strerror(number))

    def full(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExportError) as caught:
        fail(tmp_path / "new", error) if when == "writing" else write(tmp_path / "new")
    assert f"writing {tmp_path / 'new'}: expected room and permission" in str(caught.value)
    assert os.strerror(number) in caught.value.got
    assert caught.value.remedy.startswith("Free space")
    assert names(tmp_path) == []


def test_no_space_left_as_the_kernel_says_it(tmp_path: Path) -> None:
    with start(LIMITED, tmp_path / "new") as process:
        message, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "expected room and permission to write there, got [Errno 27] File too large. Free space" in message
    assert names(tmp_path) == []


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    assert "got [Errno 13] Permission denied. Choose another output folder." in refusal(tmp_path / "new")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_partial_that_is_no_folder_is_not_touched(tmp_path: Path, kind: str) -> None:
    """A link could lead to anything, and a partial folder is emptied."""
    mine, aside = tmp_path / "mine", tmp_path / ".new.partial"
    mine.mkdir()
    (mine / "precious").write_text("")
    if kind == "link":
        aside.symlink_to(mine)
    else:
        aside.write_text("precious")
    assert "expected room and permission to write there" in refusal(tmp_path / "new")
    assert names(mine) == ["precious"]
    assert aside.is_symlink() == (kind == "link")


def test_somebody_takes_the_place_meanwhile(tmp_path: Path) -> None:
    """By other means, without the lock: what they put there stays."""

    def overtaken() -> None:
        with placed(tmp_path / "new"):
            (tmp_path / "new").write_text("theirs")

    with pytest.raises(ExportError, match="something that exists already"):
        overtaken()
    assert names(tmp_path) == ["new"]
    assert (tmp_path / "new").read_text() == "theirs"
