"""Parts of a checkpoint from elsewhere: a UNet, a VAE or an image encoder in place of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.spec.weights import COMPONENTS, Component
from tests.support import stability_file
from tests.support.commands import call

WEIGHTS = "diffusion_pytorch_model.safetensors"
MARKED: dict[Component, str] = {
    "unet": "conv_in.bias",
    "vae": "decoder.conv_in.bias",
    "image_encoder": "vision_model.post_layernorm.bias",
}


def marked(folder: Path, component: Component, into: Path) -> Path:
    """A copy of a component's file whose marked tensor is 7 throughout."""
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    tensors[MARKED[component]] = torch.full_like(tensors[MARKED[component]], 7.0)
    save_file(tensors, into)
    return into


def value(source: Path, component: Component, parts: dict[Component, str | Path]) -> float:
    module = open_checkpoint(source, parts=parts).load(component, torch.float32)
    return float(module.state_dict()[MARKED[component]][0])


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", ["file", "folder", "checkpoint"])
def test_a_part_is_read_from_a_file_its_folder_or_another_checkpoint(
    tiny_checkpoint: Path, tmp_path: Path, component: Component, kind: str
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    (file,) = (other / component).glob("*.safetensors")
    marked(tiny_checkpoint, component, file)
    part = {"file": file, "folder": other / component, "checkpoint": other}[kind]
    checkpoint = open_checkpoint(tiny_checkpoint, parts={component: part})
    assert value(tiny_checkpoint, component, {component: part}) == 7.0
    assert checkpoint.parts == {component: str(part)}
    assert checkpoint.digest() != open_checkpoint(tiny_checkpoint).digest()
    others = [one for one in COMPONENTS if one != component]
    plain = open_checkpoint(tiny_checkpoint)
    assert all(checkpoint.weight_files(one) == plain.weight_files(one) for one in others)
    assert checkpoint.weight_files(component) != plain.weight_files(component)


def test_a_part_in_stabilitys_names(stability_pipeline: Any, tmp_path: Path) -> None:
    """Of a whole file, and of one that holds nothing else."""
    whole = stability_file.write(tmp_path / "svd.safetensors", stability_pipeline)
    tensors = stability_file.under("model.diffusion_model", stability_file.unet(stability_pipeline.unet))
    alone = tmp_path / "mine.safetensors"
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, alone)
    own = float(stability_pipeline.unet.conv_in.bias[0])
    assert value(whole, "unet", {"unet": alone}) == 2 * own
    assert value(whole, "unet", {"unet": whole}) == own


def test_a_folders_own_config_counts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(tiny_checkpoint / "vae", tmp_path / "vae"))
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert open_checkpoint(tiny_checkpoint, parts={"vae": vae}).model.latent_scale == 0.5
    (vae / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(CheckpointError, match=r"with vae of .*key in_channels: expected 16"):
        open_checkpoint(tiny_checkpoint, parts={"vae": vae})


def test_what_is_no_such_part(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unet from .*nothing: .*got no such file\. Check the path"):
        open_checkpoint(tiny_checkpoint, parts={"unet": tmp_path / "nothing"})
    with pytest.raises(CheckpointError, match=r"parts: expected some of unet, vae, .*got 'text'"):
        open_checkpoint(tiny_checkpoint, parts={"text": tiny_checkpoint})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="expected diffusion_pytorch_model"):
        open_checkpoint(tiny_checkpoint, parts={"unet": tmp_path})
    with pytest.raises(SettingsError, match="parts: expected None with a checkpoint that is open"):
        VideoEngine.from_checkpoint(open_checkpoint(tiny_checkpoint), parts={"vae": tmp_path})
    vae = tiny_checkpoint / "vae" / WEIGHTS
    with pytest.raises(CheckpointError, match=r"expected the \d+ .*tensors.*unexpected decoder\."):
        open_checkpoint(tiny_checkpoint, parts={"unet": vae}).load("unet", torch.float32)
    part = marked(tiny_checkpoint, "unet", tmp_path / "unet.safetensors")
    checkpoint = open_checkpoint(tiny_checkpoint, parts={"unet": part})
    part.unlink()
    with pytest.raises(CheckpointError, match="that was there when the checkpoint was opened"):
        checkpoint.load("unet", torch.float32)


def test_the_commands_take_parts(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = marked(tiny_checkpoint, "vae", tmp_path / "mine.safetensors")
    assert call(main, "info", tiny_checkpoint, "--vae", part) == 0
    said = capsys.readouterr().out
    assert f"vae from        {part}\n" in said
    assert "vae/mine.safetensors, " in said
    assert call(main, "info", "--vae", part) == 2
    assert "belong to a checkpoint" in " ".join(capsys.readouterr().err.split())
    assert call(main, "generate", "x.jpg", "-o", "x.mp4", "--bundle", tmp_path, "--unet", part) == 2
    assert "belong to --checkpoint" in " ".join(capsys.readouterr().err.split())
