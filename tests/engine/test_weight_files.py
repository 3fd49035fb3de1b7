"""Which weight files are read: those that diffusers reads, held against diffusers itself."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.checkpoint.weight_files import STEMS, candidates, choose
from svd_engine.engine import VideoEngine
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.spec.weights import COMPONENTS, Component, WeightFile

MARKED: dict[Component, str] = {  # a tensor of each component that tells its files apart
    "unet": "conv_in.bias",
    "vae": "decoder.conv_in.bias",
    "image_encoder": "vision_model.post_layernorm.bias",
}
VALUES = {"single": 1.0, "shards": 2.0, "half": 3.0, "half shards": 4.0}


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "tiny"))


def put(folder: Path, component: Component, module: Any, kind: str) -> None:
    """Adds a set of weight files whose marked tensor says which set it is."""
    aside = folder / "aside"
    value = module.state_dict()[MARKED[component]]
    before = value.clone()
    value.fill_(VALUES[kind])
    size = "30KB" if component == "image_encoder" else "500KB"
    module.save_pretrained(
        aside,
        max_shard_size=size if "shards" in kind else "1GB",
        variant="fp16" if "half" in kind else None,
    )
    value.copy_(before)
    for file in aside.iterdir():
        if file.name != "config.json":
            shutil.move(file, folder / component / file.name)
    shutil.rmtree(aside)


def by_diffusers(folder: Path, component: Component, variant: str | None) -> float:
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionModelWithProjection

    kinds: dict[Component, Any] = {
        "unet": UNetSpatioTemporalConditionModel,
        "vae": AutoencoderKLTemporalDecoder,
        "image_encoder": CLIPVisionModelWithProjection,
    }
    module = kinds[component].from_pretrained(folder / component, variant=variant)
    return float(module.state_dict()[MARKED[component]][0])


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize(
    "kinds",
    [
        ("single", "shards"),
        ("single", "half"),
        ("single", "shards", "half", "half shards"),
        ("shards", "half"),
        ("single", "half shards"),
    ],
    ids=lambda kinds: "+".join(kinds).replace(" ", "-"),
)
def test_of_several_sets_the_one_that_diffusers_reads(
    folder: Path, diffusers_pipeline: Any, component: Component, variant: str | None, kinds: tuple[str, ...]
) -> None:
    for file in (folder / component).glob("*.safetensors"):
        file.unlink()
    for kind in kinds:
        put(folder, component, getattr(diffusers_pipeline, component), kind)
    has_half = any("half" in kind for kind in kinds)
    if variant and not has_half:
        with pytest.raises(CheckpointError, match="variant fp16"):
            open_checkpoint(folder, variant)
        return
    ours = open_checkpoint(folder, variant).load(component, torch.float32).state_dict()
    assert float(ours[MARKED[component]][0]) == by_diffusers(folder, component, variant)


@pytest.mark.parametrize("component", ["unet", "image_encoder"])
@pytest.mark.parametrize("style", ["index.fp16", "fp16.index", "renamed"])
def test_a_variant_before_and_after_the_suffix(
    folder: Path, diffusers_pipeline: Any, component: Component, style: str
) -> None:
    put(folder, component, getattr(diffusers_pipeline, component), "half shards")
    stem = f"{STEMS[component]}.safetensors"
    index = folder / component / f"{stem}.index.fp16.json"
    if style == "fp16.index":  # as older diffusers wrote them
        shards = sorted((folder / component).glob("*.fp16-*-of-*.safetensors"))
        text = index.read_text()
        for shard in shards:
            number = shard.name.removeprefix(f"{STEMS[component]}.fp16").removesuffix(".safetensors")
            older = f"{STEMS[component]}{number}.fp16.safetensors"
            text = text.replace(shard.name, older)
            shard.rename(shard.with_name(older))
        index.write_text(text)
        index.rename(index.with_name(f"{stem}.fp16.index.json"))
    elif style == "renamed":
        index.rename(index.with_name(f"{STEMS[component]}.fp16.safetensors.index.json"))
    module = open_checkpoint(folder, "fp16").load(component, torch.float32)
    assert float(module.state_dict()[MARKED[component]][0]) == VALUES["half shards"]


def test_components_without_the_variant_are_read_without_it(folder: Path, diffusers_pipeline: Any) -> None:
    """As diffusers' pipeline does."""
    from diffusers import StableVideoDiffusionPipeline

    put(folder, "unet", diffusers_pipeline.unet, "half")
    put(folder, "vae", diffusers_pipeline.vae, "single")
    theirs = StableVideoDiffusionPipeline.from_pretrained(folder, variant="fp16")
    ours = open_checkpoint(folder, "fp16")
    for component, value in (("unet", VALUES["half"]), ("vae", VALUES["single"])):
        tensor = getattr(theirs, component).state_dict()[MARKED[component]]  # type: ignore[index]
        assert float(tensor[0]) == value
        module = ours.load(component, torch.float32)  # type: ignore[arg-type]
        assert float(module.state_dict()[MARKED[component]][0]) == value  # type: ignore[index]


def only_half(folder: Path) -> None:
    """What `snapshot_download` of a variant leaves."""
    for component in COMPONENTS:
        (file,) = (folder / component).glob("*.safetensors")
        file.rename(file.with_name(f"{STEMS[component]}.fp16.safetensors"))


def test_a_folder_of_another_variant_only_is_refused_with_the_way_to_ask_for_it(folder: Path) -> None:
    only_half(folder)
    with pytest.raises(
        CheckpointError,
        match=r"unet: expected diffusion_pytorch_model\.safetensors\.index\.json or "
        r"diffusion_pytorch_model\.safetensors, got files of the variant fp16 only\. "
        r'Use variant="fp16"\.',
    ):
        open_checkpoint(folder)
    assert open_checkpoint(folder, "fp16").weight_files("vae")[0].file == (
        "diffusion_pytorch_model.fp16.safetensors"
    )


@pytest.mark.parametrize(
    ("half", "got"), [(False, "only files without a variant"), (True, "files of fp16 only")]
)
def test_a_variant_that_no_component_has(folder: Path, half: bool, got: str) -> None:
    if half:
        only_half(folder)
    with pytest.raises(CheckpointError, match=rf"tiny: expected weight files of the variant ema, got {got}"):
        open_checkpoint(folder, "ema")


def test_a_variant_in_pickles_is_refused_and_not_passed_over(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.fp16.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"unet: expected safetensors, got pickles only"):
        open_checkpoint(folder, "fp16")


def test_the_order_is_told_apart_by_library() -> None:
    assert candidates("unet", None)[0].endswith(".index.json")
    assert candidates("image_encoder", None)[0] == "model.safetensors"
    assert choose({"unet/diffusion_pytorch_model.safetensors"}, "unet", None, "x") == (
        "unet/diffusion_pytorch_model.safetensors"
    )


def test_files_are_told_by_name_size_and_hash_of_what_is_there_now(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    for value in (1.0, 2.0):
        tensors = load_file(file)
        tensors[MARKED["vae"]] = torch.full_like(tensors[MARKED["vae"]], value)
        save_file(tensors, file)
        content = file.read_bytes()
        assert open_checkpoint(folder).weight_files("vae") == (
            WeightFile(
                component="vae",
                file=file.name,
                bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            ),
        )


def test_a_file_that_went_away_after_opening(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae/diffusion.*was there when .*got no such file\. Bring"):
        checkpoint.load("vae", torch.float32)


@pytest.mark.parametrize("change", [{"bytes": -1}, {"sha256": "0"}, {"component": "text"}, {"more": 1}])
def test_a_record_is_bounded(change: dict[str, Any]) -> None:
    good = {"component": "vae", "file": "x", "bytes": 1, "sha256": "0" * 64}
    WeightFile.model_validate(good)
    with pytest.raises(ValidationError):
        WeightFile.model_validate({**good, **change})


def test_the_report_names_the_files_that_were_read(folder: Path) -> None:
    with VideoEngine.from_checkpoint(folder, backend="eager", device="cpu") as engine:
        result = engine(
            torch.zeros(1, 3, 32, 32), height=32, width=32, num_frames=1, num_inference_steps=1,
            output_type="latent",
        )  # fmt: skip
    checkpoint = open_checkpoint(folder)
    expected = {file for component in COMPONENTS for file in checkpoint.weight_files(component)}
    assert set(result.report.weights) == expected


def test_an_open_checkpoint_has_its_variant_already(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"variant: expected None.*Open it with open_checkpoint"):
        VideoEngine.from_checkpoint(open_checkpoint(folder), variant="fp16")
