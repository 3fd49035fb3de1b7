"""Configs that are SVD's become a Model; every other one is refused by file and key."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from diffusers import EulerDiscreteScheduler
from pydantic import TypeAdapter

from svd_engine.checkpoint.configs import FILES, _Scheduler, describe, read_configs
from svd_engine.checkpoint.random_weights import svd_configs
from svd_engine.errors import CheckpointError
from svd_engine.spec.conditioning import svd_conditioning
from svd_engine.spec.model import Architecture, Model

Configs = dict[str, dict[str, Any]]


@pytest.fixture
def configs() -> Configs:
    return svd_configs(frames=25)


def test_svd_becomes_the_model_that_its_authors_published(configs: Configs) -> None:
    assert describe("svd-xt", "here", configs) == Model(
        name="svd-xt",
        architecture=Architecture(
            clip_size=224, embedding_dim=1024, latent_channels=4, vae_scale=8, size_multiple=64
        ),
        frames=25,
        height=576,
        width=1024,
        sigma_min=0.002,
        sigma_max=700.0,
        rho=7.0,
        latent_scale=0.18215,
        clip_mean=(0.48145466, 0.4578275, 0.40821073),
        clip_std=(0.26862954, 0.26130258, 0.27577711),
        random_weights=False,
    )


def test_a_model_survives_a_json_document(configs: Configs) -> None:
    model = describe("svd-xt", "here", configs)
    adapter = TypeAdapter(Model)
    assert adapter.validate_json(adapter.dump_json(model)) == model
    assert json.loads(adapter.dump_json(model)) == json.loads(json.dumps(asdict(model)))


def test_a_folder_of_diffusers_is_read(tiny_checkpoint: Path) -> None:
    model = describe("tiny", "here", read_configs(tiny_checkpoint))
    assert model.architecture == Architecture(
        clip_size=32,
        embedding_dim=32,
        latent_channels=4,
        vae_scale=2,
        size_multiple=4,
        conditioning=svd_conditioning(32),
    )


def test_the_native_size_is_a_pair_in_the_unet_config(configs: Configs) -> None:
    configs["unet"]["sample_size"] = [40, 72]
    model = describe("mine", "here", configs)
    assert (model.height, model.width) == (320, 576)


def test_keys_that_the_published_configs_hold_beside_are_allowed(configs: Configs) -> None:
    configs["scheduler"] |= {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    configs["image_encoder"] |= {"_name_or_path": "somewhere", "torch_dtype": "float16"}
    configs["feature_extractor"]["crop_size"] = 224
    assert describe("svd-xt", "here", configs).frames == 25


def test_what_may_be_absent_has_diffusers_default() -> None:
    """And what SVD needs otherwise may not be absent."""
    diffusers = inspect.signature(EulerDiscreteScheduler.__init__).parameters
    for key, field in _Scheduler.model_fields.items():
        if key != "class_name" and not field.is_required():
            assert field.default == diffusers[key].default, key


@pytest.mark.parametrize(
    ("part", "key", "value", "expected"),
    [
        ("scheduler", "_class_name", "DDIMScheduler", "'EulerDiscreteScheduler'"),
        ("scheduler", "prediction_type", "epsilon", "'v_prediction'"),
        ("scheduler", "timestep_type", "discrete", "'continuous'"),
        ("scheduler", "timestep_spacing", "trailing", "'leading'"),
        ("scheduler", "use_karras_sigmas", False, "True"),
        ("scheduler", "use_exponential_sigmas", True, "False"),
        ("scheduler", "use_beta_sigmas", True, "False"),
        ("scheduler", "final_sigmas_type", "sigma_min", "'zero'"),
        ("scheduler", "sigma_min", None, "a valid number"),
        ("scheduler", "sigma_max", 0.001, "more than sigma_min, 0.002"),
        ("unet", "_class_name", "UNet3DConditionModel", "'UNetSpatioTemporalConditionModel'"),
        ("unet", "num_frames", "25", "a valid integer"),
        ("unet", "num_frames", 0, "greater than or equal to 1"),
        ("unet", "in_channels", 4, "8 (twice the VAE's latent_channels)"),
        ("unet", "out_channels", 8, "4 (the VAE's latent_channels)"),
        ("unet", "cross_attention_dim", 768, "1024 (CLIP's projection_dim)"),
        (
            "unet",
            "projection_class_embeddings_input_dim",
            2816,
            "768, 256 or 1280 (3 addition_time_embed_dim in SVD",
        ),
        ("vae", "_class_name", "AutoencoderTiny", "'AutoencoderKLTemporalDecoder' or 'AutoencoderKL'"),
        ("vae", "scaling_factor", float("nan"), "a finite number"),
        ("image_encoder", "architectures", ["CLIPModel"], "'CLIPVisionModelWithProjection'"),
        ("feature_extractor", "crop_size", {"height": 224, "width": 336}, "{224} (CLIP's image_size)"),
        ("feature_extractor", "image_std", [0.0, 1.0, 1.0], "equal to 0.000001"),
        ("feature_extractor", "image_mean", [0.5], "at least 3 items"),
    ],
)
def test_refuses_what_is_not_svd(configs: Configs, part: str, key: str, value: Any, expected: str) -> None:
    configs[part][key] = value
    with pytest.raises(CheckpointError) as caught:
        describe("mine", "here", configs)
    message = str(caught.value)
    assert message.startswith(f"here/{FILES[part]}, key {key}: expected ")
    assert expected in message
    assert "Pass an unmodified SVD checkpoint" in message


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("scheduler", "prediction_type"),
        ("scheduler", "timestep_spacing"),
        ("scheduler", "sigma_max"),
        ("unet", "num_frames"),
        ("vae", "scaling_factor"),
        ("image_encoder", "projection_dim"),
        ("feature_extractor", "image_mean"),
    ],
)
def test_refuses_an_absent_key(configs: Configs, part: str, key: str) -> None:
    del configs[part][key]
    with pytest.raises(CheckpointError, match=f"{FILES[part]}, key {key}: expected a value.*got no such key"):
        describe("mine", "here", configs)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"max_guidance": 1.5},
            "key max_guidance: expected one of min_guidance_scale, max_guidance_scale, guider, "
            "num_inference_steps, got",
        ),
        ({"max_guidance_scale": "2"}, "key max_guidance_scale: expected a valid number, got '2'"),
        ({"min_guidance_scale": float("inf")}, "key min_guidance_scale: expected a finite number, got inf"),
    ],
)
def test_refuses_recommended_guidance_that_is_none(configs: Configs, config: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=f"here/generation_config.json, {said}"):
        describe("mine", "here", {**configs, "generation": config})


def test_refuses_a_pipeline_of_another_family(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableVideoDiffusionPipeline", "StableDiffusionXLPipeline"))
    with pytest.raises(
        CheckpointError,
        match=r"model_index\.json: expected _class_name StableVideoDiffusionPipeline, or "
        r"StableVideo3DDiffusionPipeline of SV3D, got StableDiffusionXLPipeline\. .*pass an SVD checkpoint",
    ):
        read_configs(folder)


@pytest.mark.parametrize("file", ["model_index.json", *FILES.values()])
@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "no such file"),
        (b"{", "Expecting"),
        (b"[]", "a JSON list"),
        (b"\xff", "decode"),
        (b"[" * 99999, "recur"),
    ],
)
def test_refuses_a_file_that_is_no_json_object(
    tiny_checkpoint: Path, tmp_path: Path, file: str, content: bytes | None, got: str
) -> None:
    folder = Path(
        shutil.copytree(tiny_checkpoint, tmp_path / "broken", ignore=shutil.ignore_patterns("*.safe*"))
    )
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"{file}: expected a JSON object.*got .*{got}.*Pass the folder"
    ):
        read_configs(folder)
