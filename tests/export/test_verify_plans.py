"""`svd-export verify --backend tensorrt|tensorrt-rtx`: refused without a GPU; what becomes of its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.flavours import TENSORRT
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, NonFiniteOutput, ParityError
from svd_export import verify_plans as module
from svd_export.cli import main
from svd_export.to_tensorrt import build_plans
from svd_export.verify_plans import verify_plans
from tests.support.commands import call
from tests.support.tensorrt_double import VERSION


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu(half_bundle: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert call(main, "verify", half_bundle, "--backend", backend, "--device", "cpu") == 1
    said = capsys.readouterr().err
    assert "expected a CUDA GPU that the plans were built for, got device cpu" in said
    assert "--backend onnxruntime verifies the graphs here" in said


def test_a_checkpoint_is_of_no_use(half_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "verify", half_bundle, "--backend", "tensorrt", "--checkpoint", "demo") == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "--image-encoder, --exported-lora and --no-write belong to --backend onnxruntime" in said


def rows(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, off: float) -> Any:
    build_plans(Bundle(folder))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    reference = torch.linspace(-1, 1, 9)
    pair = ({"out": reference}, {"out": reference + off})
    monkeypatch.setattr(module, "outputs", lambda *_: pair)
    return verify_plans(Bundle(folder), TENSORRT, torch.device("cuda", 0), lambda line: None)


def test_within_tolerance(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(trt, folder, monkeypatch, 1e-6)
    assert len(found) == 4
    assert all(row.relative == pytest.approx(1e-6, rel=0.1) for row in found)
    assert all(row.backend == f"TensorRT {VERSION} cuda:0" for row in found)


def test_beyond_tolerance(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ParityError, match=r"of ONNX Runtime's largest value, got 0\.5") as caught:
        rows(trt, folder, monkeypatch, 0.5)
    assert f"svd-export tensorrt {folder}" in caught.value.remedy


def test_no_number(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NonFiniteOutput):
        rows(trt, folder, monkeypatch, float("nan"))


def test_no_plan(trt: Any, folder: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no plan"):
        verify_plans(Bundle(folder), TENSORRT, torch.device("cuda", 0), lambda line: None)
