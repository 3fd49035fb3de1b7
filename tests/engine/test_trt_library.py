"""TensorRT's module: missing, of a version that is not ours, and what becomes of its log."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from svd_engine.backends.trt_library import log, machine, require_tensorrt
from svd_engine.errors import BackendUnavailable
from tests import tensorrt_double
from tests.tensorrt_double import Severity
from tests.tensorrt_plans import MACHINE


def refusal() -> str:
    with pytest.raises(BackendUnavailable) as caught:
        require_tensorrt()
    assert "pip install 'svd-engine[tensorrt]'" in caught.value.remedy
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
    assert require_tensorrt() == version


def test_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    assert machine(torch.device("cuda", 0)) == MACHINE
    assert str(MACHINE) == "TensorRT 10.14.1.48 on NVIDIA Any 80GB, sm_90"


def test_errors_wait_and_the_rest_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt_double.install(monkeypatch)
    caplog.set_level(logging.DEBUG)
    for severity in Severity:
        log().log(severity, f"words of {severity.name}")
    assert log().errors_so_far() == "words of INTERNAL_ERROR; words of ERROR"
    assert log().errors_so_far() == "no word from TensorRT's log"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "words of WARNING"),
        ("INFO", "words of INFO"),
        ("DEBUG", "words of VERBOSE"),
    ]


def test_one_logger_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    assert log() is log()
