"""Single files converted to folders that diffusers reads, and how the exporter opens what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint, open_checkpoint
from svd_engine.errors import ExportError
from svd_engine.spec.weights import COMPONENTS
from svd_export.cli import main
from svd_export.to_onnx import source_of
from tests.support import damage, stability_file
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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """The checkpoints that are handed to the exporter and to the comparison, which are not run."""
    checkpoints: list[Checkpoint] = []

    def export(checkpoint: Checkpoint, *_: Any) -> Any:
        checkpoints.append(checkpoint)
        raise ExportError("export", expected="nothing", got="a checkpoint", remedy="Go on.")

    def compare(_bundle: Bundle, checkpoint: Checkpoint, *_: Any, **__: Any) -> list[Any]:
        checkpoints.append(checkpoint)
        return []

    monkeypatch.setattr("svd_export.to_onnx.export_bundle", export)
    monkeypatch.setattr("svd_export.verify.verify", compare)
    return checkpoints


def test_a_file_with_a_part_and_lora_is_exported_and_opened_again_to_verify(
    stability_pipeline: Any, tiny_bundle: Path, tmp_path: Path, opened: list[Checkpoint]
) -> None:
    file = stability_file.write(tmp_path / "mine.safetensors", stability_pipeline)
    part = stability_file.write(tmp_path / "part.safetensors", stability_pipeline)
    lora = tmp_path / "lora.safetensors"
    save_file(
        {
            "unet.conv_in.lora_A.weight": torch.ones(1, 8, 3, 3),
            "unet.conv_in.lora_B.weight": torch.ones(64, 1, 1, 1),
            "unet.else": torch.ones(1),
        },
        lora,
    )
    given = ("--vae", part, "--lora", f"{lora}:0.5", "--lora-partial")
    assert call(main, "onnx", file, "-o", tmp_path / "bundle", "--frames", 2, *given) == 1
    (exported,) = opened
    assert exported.model.frames == 2
    source = source_of(exported, exported.weight_files("vae"))
    assert source.parts == {"vae": str(part)}
    assert [one.file for one in source.weights] == ["part.safetensors"]
    assert [(one.file, one.scale, one.fused, one.left) for one in source.lora] == [(str(lora), 0.5, 1, 1)]

    bundle = damage.copy(tiny_bundle, tmp_path)
    damage.edit(bundle, lambda manifest: manifest.update(source=json.loads(source.model_dump_json())))
    damage.edit(bundle, lambda manifest: manifest["model"].update(frames=2))
    assert call(main, "verify", bundle, "--device", "cpu", "--no-write") == 0
    again = opened[1]
    assert again.digest() == exported.digest()
    assert (again.parts, again.lora) == (exported.parts, exported.lora)


def test_random_weights_take_no_part(tmp_path: Path) -> None:
    assert call(main, "onnx", "--random-weights", "small", "-o", tmp_path / "x", "--vae", tmp_path) == 2


def test_a_full_disk_is_told_and_leaves_nothing(
    stability_pipeline: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """safetensors has an error of its own for it."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    file = stability_file.write(tmp_path / "svd.safetensors", stability_pipeline)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert call(main, "convert", file, "-o", tmp_path / "folder") == 1
    assert "No space left on device (os error 28). Free space, or" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"svd.safetensors"}
