"""What the exporter's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_export.to_onnx import export_bundle
from tests.conftest import ONE_OF_EACH
from tests.support import damage, tensorrt_builder_double
from tests.support.shared import made_once

NETWORKS = ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")


@pytest.fixture(scope="session")
def brain_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `half_bundle`, bfloat16."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    return made_once(
        tmp_path_factory,
        "bundle/brain",
        lambda folder: export_bundle(checkpoint, folder, [ONE_OF_EACH], torch.bfloat16),
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
