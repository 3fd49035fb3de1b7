"""The document on disk is whole after every change."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_bench.documents.recorder import Recorder, out_folder
from svd_bench.documents.results import Outcome, read_results
from svd_engine.errors import OutputError
from tests.bench.documents import environment, row


def test_every_change_is_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    recorder = Recorder("run", environment(), path)
    recorder.put("a", row(ms=1))
    assert read_results(path) == recorder.results()
    recorder.put("b", row(ms=2))
    recorder.put("a", row(ms=3))
    assert [r.latency_ms.median for r in read_results(path).rows] == [3, 2]  # replaced in its place
    recorder.warn("hot")
    recorder.warn("hot")
    recorder.warn(None)
    recorder.warn("")
    assert read_results(path).warnings == ("hot",)
    recorder.ended(Outcome(stage="x", status="skipped", seconds=0, why="no GPU"))
    assert read_results(path).outcomes[0].why == "no GPU"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder("run", environment())
    recorder.put("a", row())
    assert list(tmp_path.iterdir()) == []
    assert len(recorder.results().rows) == 1


def test_the_folder_is_made(tmp_path: Path) -> None:
    assert out_folder(tmp_path / "a" / "b").is_dir()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match=r"folder .*a: expected a folder .* --out"):
        out_folder(tmp_path / "a")


def test_a_folder_that_takes_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before minutes are spent; permission bits do not tell of a full or read-only disk."""

    def refused(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(OutputError, match=r"got .*Read-only file system.* --out"):
        out_folder(tmp_path)
