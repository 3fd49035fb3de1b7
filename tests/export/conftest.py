"""What the exporter's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.spec.profile import Profile
from svd_export.to_onnx import export_bundle
from tests.support import damage, tensorrt_builder_double
from tests.support.shared import made_once

NETWORKS = ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")


def half(tiny_checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float16) -> Path:
    """One profile without guidance: `tiny_checkpoint` at 2 frames of 32x16."""
    profile = Profile(2, 32, 16, 1, "single", 2)
    export_bundle(open_checkpoint(str(tiny_checkpoint)), folder, [profile], dtype)
    return folder


@pytest.fixture(scope="session")
def half_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "half/tiny", lambda folder: half(tiny_checkpoint, folder))


@pytest.fixture(scope="session")
def brain_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `half_bundle`, bfloat16."""
    return made_once(
        tmp_path_factory, "brain/tiny", lambda folder: half(tiny_checkpoint, folder, torch.bfloat16)
    )


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recording double."""
    return tensorrt_builder_double.install(monkeypatch)


@pytest.fixture
def folder(half_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return damage.copy(half_bundle, tmp_path)


def plans(folder: Path) -> dict[str, PlanEntry]:
    """By network."""
    return {plan.network.partition("-")[0]: plan for plan in Bundle(folder).manifest.plans}


def built(trt: Any) -> list[str]:
    """Keys of the networks that the double was asked to build, in order."""
    return [name for (name,) in trt.called("Builder.build_serialized_network")]
