"""Weight files as diffusers and transformers write them, whole and damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.checkpoint.weights import Component, build, fill
from svd_engine.errors import CheckpointError

VAE = "vae/diffusion_pytorch_model.safetensors"
VAE_HALF = "vae/diffusion_pytorch_model.fp16.safetensors"
BIAS = "decoder.conv_in.bias"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def load(folder: Path, component: Component = "vae", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return open_checkpoint(str(folder)).load(component, dtype)


def rewrite(file: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Changes tensors of a safetensors file; None takes one out."""
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "value"), [(None, 1), ("fp16", 2)])
def test_the_variant_is_what_was_asked_for_whatever_the_dtype(
    folder: Path, dtype: torch.dtype, variant: str | None, value: int
) -> None:
    shutil.copy(folder / VAE, folder / VAE_HALF)
    rewrite(folder / VAE, {BIAS: torch.full((64,), 1.0)})
    rewrite(folder / VAE_HALF, {BIAS: torch.full((64,), 2.0, dtype=torch.float16)})
    bias = open_checkpoint(folder, variant).load("vae", dtype).state_dict()[BIAS]
    assert (bias.dtype, bias[0]) == (dtype, value)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("component", ["unet", "image_encoder"])
def test_shards_are_put_together(
    folder: Path, diffusers_pipeline: Any, component: Component, variant: str | None
) -> None:
    reference = getattr(diffusers_pipeline, component)
    shutil.rmtree(folder / component)
    reference.save_pretrained(folder / component, max_shard_size="30KB", variant=variant)
    assert len(list((folder / component).glob("*.safetensors"))) > 1
    ours = open_checkpoint(folder, variant).load(component, torch.float32).state_dict()
    assert all(torch.equal(tensor, ours.pop(name)) for name, tensor in reference.state_dict().items())
    assert not ours


def test_the_published_position_ids_are_allowed_and_nothing_else_is(folder: Path) -> None:
    file = folder / "image_encoder" / "model.safetensors"
    rewrite(file, {"vision_model.embeddings.position_ids": torch.zeros(1, 17, dtype=torch.int64)})
    embeddings = load(folder, "image_encoder").get_submodule("vision_model.embeddings")
    assert torch.equal(embeddings.get_buffer("position_ids"), torch.arange(17)[None])
    rewrite(file, {"vision_model.embeddings.extra": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"got unexpected vision_model\.embeddings\.extra \[2\]\. Pass"):
        load(folder, "image_encoder")


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({BIAS: None}, rf"no {BIAS} \[64\]"),
        ({BIAS: torch.zeros(32)}, rf"{BIAS} \[32\] instead of \[64\]"),
        ({BIAS: torch.zeros(64, dtype=torch.int8)}, f"{BIAS} in I8"),
        ({"lora": torch.zeros(1)}, r"unexpected lora \[1\]"),
    ],
)
def test_refuses_other_tensors_than_the_config_says(
    folder: Path, change: dict[str, torch.Tensor | None], got: str
) -> None:
    rewrite(folder / VAE, change)
    with pytest.raises(
        CheckpointError, match=rf"tiny/vae: expected the \d+ floating-point.*got {got}\. Pass weights"
    ):
        load(folder)


def test_names_five_tensors_and_counts_the_rest(folder: Path) -> None:
    rewrite(folder / VAE, {f"extra{i}": torch.zeros(1) for i in range(7)})
    with pytest.raises(CheckpointError, match=r"got (unexpected extra\d \[1\](; )?){5} and 2 more\."):
        load(folder)


def test_refuses_a_name_that_a_header_holds_twice(folder: Path) -> None:
    """safetensors before 0.6 takes the last of them."""
    data = (folder / VAE).read_bytes()
    lost = b'"decoder.mid_block.resnets.0.spatial_res_block.norm1.bias"'
    assert data.count(lost) == 1
    (folder / VAE).write_bytes(data.replace(lost, lost.replace(b"norm1", b"norm2")))
    with pytest.raises(CheckpointError, match=r"norm2\.bias twice .*Download it again"):
        load(folder)


def test_refuses_a_tensor_in_two_shards(folder: Path, diffusers_pipeline: Any) -> None:
    shutil.rmtree(folder / "vae")
    diffusers_pipeline.vae.save_pretrained(folder / "vae", max_shard_size="100KB")
    first, second, *_ = sorted((folder / "vae").glob("*.safetensors"))
    rewrite(second, {next(iter(load_file(first))): torch.zeros(1)})
    with pytest.raises(CheckpointError, match=rf"in both {first.name} and {second.name}"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b'{"weight_map": {"a": "../secret.safetensors"}}',
        b'{"weight_map": {"a": "not-there.safetensors"}}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": []}',
        b"{}",
        b"[]",
        b"{",
    ],
)
def test_refuses_a_broken_index_of_shards(folder: Path, content: bytes) -> None:
    shutil.move(folder / VAE, folder / "secret.safetensors")
    (folder / f"{VAE}.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json: expected a weight_map.*got .*Download"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 7, 1000, -1])
def test_refuses_a_truncated_file(folder: Path, keep: int) -> None:
    data = (folder / VAE).read_bytes()[:keep]
    (folder / VAE).write_bytes(data)
    with pytest.raises(
        CheckpointError,
        match=rf"{VAE}: expected a whole safetensors file, got .*\({len(data)} bytes\).*Download it again",
    ):
        load(folder)


def test_refuses_a_git_lfs_pointer(folder: Path) -> None:
    (folder / VAE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 391017740\n")
    with pytest.raises(CheckpointError, match=r"expected a whole safetensors file.*git lfs pull"):
        load(folder)


def test_refuses_pickles(folder: Path) -> None:
    weights = load_file(folder / VAE)
    (folder / VAE).unlink()
    torch.save(weights, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"expected safetensors, got pickles only \(diffusion_pytorch_model\.bin\).*Convert them",
    ):
        load(folder)


def test_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / "image_encoder" / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"image_encoder: expected model\.safetensors or model\.safetensors\.index\.json, "
        r"got neither\. Download",
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("component", "key", "value"),
    [
        ("unet", "num_attention_heads", [1, 2, 3]),
        ("vae", "down_block_types", ["NoSuchBlock", "NoSuchBlock"]),
        ("image_encoder", "hidden_size", "wide"),
    ],
)
def test_refuses_a_config_from_which_no_network_can_be_made(
    folder: Path, component: Component, key: str, value: Any
) -> None:
    config = folder / component / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(
        CheckpointError, match=rf"config\.json of the {component}: expected values.*got .*unmodified"
    ):
        load(folder, component)


def test_refuses_to_leave_a_buffer_without_a_value() -> None:
    class Newer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("frequencies", torch.ones(3), persistent=False)

    with torch.device("meta"):
        module = Newer()
    with pytest.raises(
        CheckpointError, match=r"Newer .*expected a value.*got none for frequencies\. Install"
    ):
        fill(module, {})


def test_loaded_weights_do_not_depend_on_their_file_any_more(folder: Path) -> None:
    module = load(folder)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with (folder / VAE).open("r+b") as file:
        file.write(bytes((folder / VAE).stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_building_takes_no_memory(tiny_checkpoint: Path) -> None:
    module = build("unet", open_checkpoint(str(tiny_checkpoint)).configs["unet"])
    assert all(parameter.is_meta or parameter.numel() == 1 for parameter in module.parameters())
