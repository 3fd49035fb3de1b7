"""What the exporter's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svd_engine.checkpoint import open_checkpoint
from svd_engine.manifest import Form
from svd_engine.networks.spec import Profile
from svd_export.to_onnx import export_bundle


def half(tiny_checkpoint: Path, parent: Path, form: Form = "attention") -> Path:
    """float16, one profile without guidance: `tiny_checkpoint` at 2 frames of 32x16."""
    folder = parent / "tiny"
    profile = Profile(2, 32, 16, 1, "single", 2)
    export_bundle(open_checkpoint(str(tiny_checkpoint)), folder, [profile], torch.float16, form=form)
    return folder


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half(tiny_checkpoint, tmp_path_factory.mktemp("half"))
