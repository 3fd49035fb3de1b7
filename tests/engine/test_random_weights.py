"""Random checkpoints: the published architectures, reproducible weights, and small ones that behave."""

from __future__ import annotations

import hashlib
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from svd_engine.checkpoint.opening import Component, random_checkpoint
from svd_engine.checkpoint.random_weights import RandomWeights, draw, svd_configs
from svd_engine.checkpoint.weights import build
from svd_engine.cli import options
from svd_engine.spec.weights import Family
from tests.support.paths import PHOTOGRAPH

COMPONENTS: tuple[Component, ...] = get_args(Component)


@pytest.mark.parametrize(
    ("component", "millions"), [("unet", 1524.623082), ("vae", 97.742847), ("image_encoder", 632.0768)]
)
def test_the_architectures_have_the_published_parameter_counts(component: Component, millions: float) -> None:
    module = build(component, svd_configs(14)[component])
    assert sum(parameter.numel() for parameter in module.parameters()) == round(millions * 1e6)


def test_the_unet_is_the_one_that_diffusers_makes_by_default() -> None:
    """`UNetSpatioTemporalConditionModel()` has SVD's own configuration, except for the two sizes."""
    from diffusers import UNetSpatioTemporalConditionModel

    with torch.device("meta"):
        theirs = UNetSpatioTemporalConditionModel().config
    for key, value in svd_configs(25)["unet"].items():
        if key not in ("_class_name", "sample_size"):
            assert theirs[key] == (tuple(value) if isinstance(value, list) else value), key


def test_the_commands_know_every_family() -> None:
    assert [family.value for family in options.FamilyOption] == list(get_args(Family))


@pytest.mark.parametrize(
    ("family", "frames", "width", "told"),
    [
        ("svd", 14, 1024, "SVD"),
        ("svd-xt", 25, 1024, "SVD"),
        ("sv3d-u", 21, 576, "SV3D_u"),
        ("sv3d-p", 21, 576, "SV3D_p"),
    ],
)
def test_the_families(family: Family, frames: int, width: int, told: str) -> None:
    checkpoint = random_checkpoint(family)
    model = checkpoint.model
    assert (model.name, model.frames, model.height, model.width) == (family, frames, 576, width)
    assert model.family == told
    assert model.orbits == (model.steps == 50) == family.startswith("sv3d")
    image_decoder = hasattr(build("vae", checkpoint.configs["vae"]), "post_quant_conv")
    assert image_decoder == (family == "sv3d-u")
    assert model.random_weights


def test_digests_tell_families_and_seeds_apart() -> None:
    checkpoints = [random_checkpoint("svd"), random_checkpoint("svd-xt"), random_checkpoint("small")]
    assert len({checkpoint.digest() for checkpoint in checkpoints}) == 3
    assert random_checkpoint("svd").digest() == random_checkpoint("svd").digest()
    assert list(RandomWeights(0).identity("vae")) != list(RandomWeights(1).identity("vae"))


def test_the_weights_are_the_same_in_every_process_and_release() -> None:
    """Bundles and baselines made from them stay comparable; a new hash here means a new SEED there."""
    state = random_checkpoint("small").load("unet", torch.float32).state_dict()
    values = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    assert (
        hashlib.sha256(values).hexdigest()
        == "60a3ed06a8b89c0da2be07d42765f841785d9d1d291c37d39648251a8563354d"
    )


def test_a_tensor_depends_on_its_seed_and_name_only() -> None:
    alone = RandomWeights(3).tensors("vae", {"b": (4, 5)}, torch.float32)["b"]
    after = RandomWeights(3).tensors("vae", {"a": (7,), "b": (4, 5)}, torch.float32)["b"]
    assert torch.equal(alone, after)
    assert not torch.equal(alone, draw(3, "unet.b", (4, 5), torch.float32))
    assert not torch.equal(alone, draw(4, "vae.b", (4, 5), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("component", COMPONENTS)
def test_narrow_weights_are_the_rounded_float32_ones(component: Component, dtype: torch.dtype) -> None:
    narrow = random_checkpoint("small").load(component, dtype).state_dict()
    for name, tensor in random_checkpoint("small").load(component, torch.float32).state_dict().items():
        assert torch.equal(narrow[name], tensor.to(dtype)), name


@pytest.mark.parametrize(
    ("name", "shape", "mean", "deviation"),
    [
        ("conv1.weight", (64, 16, 3, 3), 0.0, 1 / 12),
        ("conv2.weight", (64, 16, 3, 3), 0.0, 1 / 24),
        ("norm1.weight", (10_000,), 1.0, 0.1),
        ("norm1.bias", (10_000,), 0.0, 0.02),
    ],
)
def test_the_statistics_of_a_draw(name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
    values = draw(0, name, shape, torch.float32)
    assert values.mean().item() == pytest.approx(mean, abs=4 * deviation / values.numel() ** 0.5)
    assert values.std().item() == pytest.approx(deviation, rel=0.03)


def small_pipeline() -> Any:
    """diffusers' own pipeline around the small networks."""
    from diffusers import EulerDiscreteScheduler, StableVideoDiffusionPipeline
    from transformers import CLIPImageProcessor

    small = random_checkpoint("small")
    pipeline = StableVideoDiffusionPipeline(
        unet=small.load("unet", torch.float32),
        vae=small.load("vae", torch.float32),
        image_encoder=small.load("image_encoder", torch.float32),
        scheduler=EulerDiscreteScheduler.from_config(small.configs["scheduler"]),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def photograph(height: int, width: int) -> Image.Image:
    return Image.open(PHOTOGRAPH).convert("RGB").resize((width, height))


def test_the_small_networks_make_frames_of_a_sane_range() -> None:
    frames: Tensor = small_pipeline()(
        photograph(128, 192),
        height=128,
        width=192,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert frames.shape == (1, 14, 3, 128, 192)
    assert frames.isfinite().all()
    assert 0.3 < frames.mean() < 0.7
    assert 0.05 < frames.std() < 0.3
    assert ((frames == 0) | (frames == 1)).float().mean() < 0.02


def test_the_small_networks_run_at_other_multiples_of_64() -> None:
    frames = small_pipeline()(
        photograph(64, 128), height=64, width=128, num_frames=3, num_inference_steps=1, output_type="pt"
    ).frames
    assert frames.shape == (1, 3, 3, 64, 128)


def test_the_small_model() -> None:
    model = random_checkpoint("small").model
    assert (model.name, model.frames, model.height, model.width) == ("small", 14, 128, 192)
    assert (model.architecture.vae_scale, model.architecture.size_multiple) == (8, 64)
    assert model.random_weights
