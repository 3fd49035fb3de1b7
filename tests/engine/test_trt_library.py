"""TensorRT's module: missing, of a version that is not ours, and what becomes of its log."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from svd_engine.backends.tensorrt.library import host, installed, library, log, require
from svd_engine.bundle.flavours import FLAVOURS, TENSORRT, TENSORRT_RTX
from svd_engine.errors import BackendUnavailable
from svd_engine.install import install_line
from tests.support import tensorrt_double
from tests.support.tensorrt_double import Severity
from tests.support.tensorrt_plans import HOST


def refusal() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        require(TENSORRT)
    assert install_line("tensorrt") in caught.value.remedy
    assert "NVIDIA's own index" in caught.value.remedy
    return caught.value.got


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt" in refusal()


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_installed_without_its_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str) -> None:
    (tmp_path / "tensorrt.py").write_text(f"raise {error}('libnvinfer.so.10: cannot open')\n")
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal() == "libnvinfer.so.10: cannot open"


@pytest.mark.parametrize("version", ["8.6.0", "10.11.0.33", "12.0.0.1", "unknown"])
def test_another_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    tensorrt_double.install(monkeypatch, version)
    assert refusal() == version


def test_a_folder_of_this_name_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal() == "a module without a version"


@pytest.mark.parametrize("version", ["10.15.1.29", "10.14.1.48.post1", "11.4.0.106"])
def test_versions_that_we_know(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    tensorrt_double.install(monkeypatch, version)
    assert require(TENSORRT) == version


def test_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    assert host(TENSORRT, torch.device("cuda", 0)) == HOST
    assert str(HOST) == "TensorRT 10.14.1.48 on NVIDIA Any 80GB, sm90"


def test_errors_wait_and_the_rest_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt_double.install(monkeypatch)
    caplog.set_level(logging.DEBUG)
    for severity in Severity:
        log(TENSORRT).log(severity, f"words of {severity.name}")
    assert log(TENSORRT).errors_so_far() == "words of INTERNAL_ERROR; words of ERROR"
    assert log(TENSORRT).errors_so_far() == "no word from TensorRT's log"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "words of WARNING"),
        ("INFO", "words of INFO"),
        ("DEBUG", "words of VERBOSE"),
    ]


def test_one_logger_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    assert log(TENSORRT) is log(TENSORRT)


def test_which_flavours_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without importing one; a module that was put there by hand counts."""
    for flavour in FLAVOURS.values():
        monkeypatch.setitem(sys.modules, flavour.module, None)
    assert installed() == []
    tensorrt_double.install(monkeypatch, "1.7.0.1", TENSORRT_RTX)
    assert installed() == [TENSORRT_RTX]
    assert library(TENSORRT_RTX).__version__ == "1.7.0.1"


@pytest.mark.parametrize("version", ["1.6.0.1", "2.0.0.1"])
def test_another_version_of_rtx(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    tensorrt_double.install(monkeypatch, version, TENSORRT_RTX)
    with pytest.raises(BackendUnavailable, match=r"tensorrt_rtx, 1\.7 or newer and below 2, got") as caught:
        require(TENSORRT_RTX)
    assert caught.value.remedy == f"Run: {install_line('tensorrt-rtx')}"


def test_a_flavour_has_a_log_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    tensorrt_double.install(monkeypatch, "1.7.0.1", TENSORRT_RTX)
    assert log(TENSORRT) is not log(TENSORRT_RTX)
    assert log(TENSORRT_RTX).errors_so_far() == "no word from TensorRT for RTX's log"


def test_lines_are_heard_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    log(TENSORRT).log(Severity.INFO, "before")
    with log(TENSORRT).lines() as lines:
        log(TENSORRT).log(Severity.VERBOSE, "one\ntwo")
    log(TENSORRT).log(Severity.INFO, "after")
    assert lines == ["one", "two"]
