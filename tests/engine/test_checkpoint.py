"""Finding a checkpoint and loading it, against folders that diffusers wrote."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from svd_engine.checkpoint.opening import Component, open_checkpoint, random_checkpoint
from svd_engine.errors import CheckpointError

COMPONENTS: tuple[Component, ...] = get_args(Component)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loads_what_diffusers_saved(
    tiny_checkpoint: Path, diffusers_pipeline: Any, component: Component, dtype: torch.dtype
) -> None:
    module = open_checkpoint(str(tiny_checkpoint)).load(component, dtype)
    reference = getattr(diffusers_pipeline, component)
    assert type(module) is type(reference)
    expected = {name: tensor.to(dtype) for name, tensor in reference.state_dict().items()}
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in module.state_dict().items())
    assert not expected
    assert not module.training
    assert not any(tensor.requires_grad or tensor.is_meta for tensor in module.parameters())


def test_the_loaded_networks_compute_what_diffusers_do(
    tiny_checkpoint: Path, diffusers_pipeline: Any
) -> None:
    """Buffers that no file holds (CLIP's position ids) count too, which a comparison of weights misses."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(1, 2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    calls: dict[Component, Callable[[Any], torch.Tensor]] = {
        "image_encoder": lambda net: net(pixels).image_embeds,
        "vae": lambda net: net(pixels, num_frames=1).sample,
        "unet": lambda net: net(latent, torch.tensor(0.3), torch.ones(1, 1, 32), torch.ones(1, 3)).sample,
    }
    for component, call in calls.items():
        with torch.no_grad():
            ours = call(checkpoint.load(component, torch.float32))
            theirs = call(getattr(diffusers_pipeline, component))
        # not bit for bit: CPU kernels choose their path by the weights' alignment in memory
        assert (ours - theirs).abs().max() <= 1e-5


def test_the_model_of_a_folder(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert checkpoint.source == str(tiny_checkpoint)
    assert (checkpoint.model.name, checkpoint.model.frames) == ("tiny", 14)
    assert (checkpoint.model.sigma_min, checkpoint.model.sigma_max) == (0.002, 700.0)
    assert not checkpoint.model.random_weights


def test_the_home_directory_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/tiny").model.name == "tiny"


def test_a_path_is_a_folder_whatever_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename("demo")
    checkpoint = open_checkpoint(Path("demo"))
    assert checkpoint.source == "./demo"  # what opens the same folder again as a string
    assert checkpoint.digest() == open_checkpoint("./demo").digest() != open_checkpoint("demo").digest()
    assert open_checkpoint(tmp_path / "demo").source == str(tmp_path / "demo")
    with pytest.raises(CheckpointError, match=r"checkpoint \./svd: .*no such folder"):
        open_checkpoint(Path("svd"))


def test_the_digest_follows_weights_and_configs_and_nothing_else(folder: Path) -> None:
    def digest() -> str:
        return open_checkpoint(str(folder)).digest()

    first = digest()
    assert len(first) == 64
    (folder / "README.md").write_text("other files do not count")
    assert digest() == first
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    second = digest()
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"num_frames": 14', '"num_frames": 15'))
    third = digest()
    shutil.copy(weights, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert digest() == third  # it is not read
    assert len({first, second, third, open_checkpoint(folder, "fp16").digest()}) == 4


@pytest.mark.parametrize("source", ["svdxt", "no/such/folder", "https://huggingface.co/a/b"])
def test_refuses_what_is_neither_name_nor_folder_nor_hub_id(source: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected svd, .*, demo, a folder, a single file, or a hub id.*Check the"
    ):
        open_checkpoint(source)


def test_refuses_random_weights_of_an_unknown_family() -> None:
    with pytest.raises(
        CheckpointError, match=r"expected one of svd, svd-xt, sv3d-u, sv3d-p, small, got 'sdxl'\. Ask for one"
    ):
        random_checkpoint("sdxl")  # type: ignore[arg-type]


def test_importing_and_opening_cost_no_torch() -> None:
    code = (
        "import sys; from svd_engine.checkpoint.opening import open_checkpoint; open_checkpoint('demo'); "
        "print({'torch', 'diffusers', 'transformers', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
