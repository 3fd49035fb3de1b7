"""Single files exported, verified, and converted to folders that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.spec.weights import COMPONENTS
from svd_export.cli import main
from tests.support import stability_file
from tests.support.commands import call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_converted_file_is_what_diffusers_reads(
    stability_pipeline: Any, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import StableVideoDiffusionPipeline

    file = stability_file.write(tmp_path / "mine.safetensors", stability_pipeline, dtype)
    assert call(main, "convert", file, "-o", tmp_path / "folder") == 1
    assert "Use --frames 14 or --frames 25" in capsys.readouterr().err
    assert call(main, "convert", file, "-o", tmp_path / "folder", "--frames", "25") == 0
    assert "mine, 25 frames" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {
        "folder",
        "mine.safetensors",
    }
    theirs = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "folder", torch_dtype=dtype)
    ours = open_checkpoint(tmp_path / "folder")
    single = open_checkpoint(file, frames=25)
    for component in COMPONENTS:
        reference = getattr(stability_pipeline, component).state_dict()
        for loaded in (getattr(theirs, component), ours.load(component, dtype)):
            assert loaded.dtype == dtype
            assert all(torch.equal(t, reference[name].to(dtype)) for name, t in loaded.state_dict().items())
    assert (ours.model.frames, ours.model.architecture) == (25, single.model.architecture)
    assert theirs.scheduler.config.sigma_max == 700.0
    assert theirs.feature_extractor.crop_size["height"] == 32


def test_a_taken_place_and_a_damaged_file_leave_nothing(
    stability_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stability_file.write(tmp_path / "svd.safetensors", stability_pipeline)
    assert call(main, "convert", file, "-o", tmp_path) == 1
    assert "something that exists already" in capsys.readouterr().err
    content = bytearray(file.read_bytes())
    content[-4:] = b"\xff\xff\xff\x7f"  # NaN
    file.write_bytes(content)
    assert call(main, "convert", file, "-o", tmp_path / "folder") == 1
    assert "NaN or infinity" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "folder" in path.name and path.is_dir()]


def test_a_file_with_a_part_is_exported_and_verified(
    stability_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = stability_file.write(tmp_path / "mine.safetensors", stability_pipeline)
    part = stability_file.write(tmp_path / "part.safetensors", stability_pipeline)
    bundle = tmp_path / "bundle"
    size = ("--height", 64, "--width", 64, "--frames", 2, "--dtype", "fp32")
    assert call(main, "onnx", file, "-o", bundle, *size, "--vae", part) == 0
    manifest = Bundle(bundle).manifest
    assert manifest.model.frames == 2
    assert manifest.source.parts == {"vae": str(part)}
    assert {(f.component, f.file) for f in manifest.source.weights} == {
        ("unet", "mine.safetensors"),
        ("image_encoder", "mine.safetensors"),
        ("vae", "part.safetensors"),
    }
    capsys.readouterr()
    assert call(main, "verify", bundle, "--device", "cpu") == 0
    assert "denoiser" in capsys.readouterr().out
    assert call(main, "onnx", "--random-weights", "small", "-o", tmp_path / "x", "--vae", part) == 2
