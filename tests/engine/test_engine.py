"""`VideoEngine` as a user of diffusers meets it: signature, refusals, reports, and the peer's own checks."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.bundle.manifest import Manifest
from svd_engine.checkpoint.opening import open_checkpoint, random_checkpoint
from svd_engine.errors import ProfileError, SettingsError
from svd_engine.networks.modules import Modules
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support.paths import ROOT

CALL: dict[str, Any] = {
    "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "pt"
}  # fmt: skip


def images(*seeds: int) -> torch.Tensor:
    return torch.cat([torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in seeds])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def test_the_call_is_diffusers_call() -> None:
    """Same names in the same order, same defaults, but for those that are the model's own (None).

    What diffusers does not have comes after them, by name only.
    """
    theirs = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    ours = inspect.signature(VideoEngine.__call__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {ours[name].kind for name in ours if name not in theirs} == {inspect.Parameter.KEYWORD_ONLY}
    differing = {
        name
        for name in theirs
        if name != "callback_on_step_end_tensor_inputs" and ours[name].default != theirs[name].default
    }
    assert differing == {
        "height", "width", "num_inference_steps", "min_guidance_scale", "max_guidance_scale",
        "noise_aug_strength",
    }  # fmt: skip
    assert all(ours[name].default is None for name in differing)
    name = "callback_on_step_end_tensor_inputs"
    assert list(ours[name].default) == theirs[name].default


@pytest.mark.parametrize("family", ["svd", "svd-xt"])
def test_for_svd_the_default_size_is_diffusers_default(family: str) -> None:
    theirs = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    engine = VideoEngine.from_checkpoint(random_checkpoint(family), backend="eager", device="cpu")
    assert (engine.default.height, engine.default.width) == (
        theirs["height"].default,
        theirs["width"].default,
    )
    assert engine.default.frames == {"svd": 14, "svd-xt": 25}[family]


@pytest.mark.parametrize("family", ["svd", "svd-xt", "small"])
def test_for_svd_the_default_guidance_is_diffusers_default(family: Literal["svd", "svd-xt", "small"]) -> None:
    theirs = inspect.signature(StableVideoDiffusionPipeline.__call__).parameters
    model = random_checkpoint(family).model
    assert model.min_guidance_scale == theirs["min_guidance_scale"].default
    assert model.max_guidance_scale == theirs["max_guidance_scale"].default


RECOMMENDED = {"min_guidance_scale": 1.25, "max_guidance_scale": 1.5}


def folder_that_recommends(checkpoint: Path, folder: Path) -> VideoEngine:
    shutil.copytree(checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    return VideoEngine.from_checkpoint(folder, backend="eager", device="cpu")


def bundle_that_recommends(bundle: Path, folder: Path) -> VideoEngine:
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"] |= RECOMMENDED
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return VideoEngine.from_bundle(folder, backend="onnxruntime", device="cpu")


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_guidance_defaults_to_what_the_model_recommends(
    kind: str, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """A call that names guidance gets what it names, 0 too."""
    made = folder_that_recommends if kind == "checkpoint" else bundle_that_recommends
    with made(tiny_checkpoint if kind == "checkpoint" else tiny_bundle, tmp_path / "own") as engine:
        own = engine(images(1), generator=seeded(), **CALL)
        named = engine(images(1), generator=seeded(), **RECOMMENDED, **CALL)
        none = engine(images(1), generator=seeded(), max_guidance_scale=0.0, **CALL)
    used = own.report.settings
    assert (used.min_guidance_scale, used.max_guidance_scale) == (1.25, 1.5)
    assert torch.equal(own.frames, named.frames)
    assert none.report.settings.max_guidance_scale == 0.0
    assert not torch.equal(own.frames, none.frames)


def test_a_bundle_keeps_the_guidance_of_its_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """A manifest that names none, as older ones do, means diffusers' defaults."""
    document = json.loads((tiny_bundle / "manifest.json").read_text())
    model = open_checkpoint(tiny_checkpoint).model
    assert document["model"]["max_guidance_scale"] == model.max_guidance_scale == 3.0
    del document["model"]["min_guidance_scale"], document["model"]["max_guidance_scale"]
    assert Manifest.model_validate_json(json.dumps(document)).model == model


def test_sizes_default_to_the_bundles(tiny_bundle: Path) -> None:
    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        frames = engine(images(1), num_inference_steps=1, output_type="np", generator=seeded()).frames
    assert frames.shape == (1, FRAMES, HEIGHT, WIDTH, 3)


# What diffusers' own tests of this pipeline check, where it applies to an engine


def test_a_batch_gives_what_its_members_give(tiny_engine: VideoEngine) -> None:
    together = tiny_engine(images(1, 2), generator=[seeded(1), seeded(2)], **CALL).frames
    for row in (0, 1):
        alone = tiny_engine(images(row + 1), generator=seeded(row + 1), **CALL).frames
        assert float((together[row] - alone[0]).abs().max()) <= 1e-4


def test_return_dict_and_plain_are_equal(tiny_engine: VideoEngine) -> None:
    plain = tiny_engine(images(1), generator=seeded(), return_dict=False, **CALL)
    assert torch.equal(plain, tiny_engine(images(1), generator=seeded(), **CALL).frames)


def test_guidance_off_gives_every_frame(tiny_engine: VideoEngine) -> None:
    frames = tiny_engine(images(1), generator=seeded(), **{**CALL, "max_guidance_scale": 1.0}).frames
    assert frames.shape == (1, FRAMES, 3, HEIGHT, WIDTH)


def test_videos_per_prompt_multiply_the_batch(tiny_engine: VideoEngine) -> None:
    frames = tiny_engine(images(1, 2), generator=seeded(), num_videos_per_prompt=2, **CALL).frames
    assert frames.shape[0] == 4


def test_closed_and_opened_again_it_gives_the_same(tiny_checkpoint: Path) -> None:
    engine = VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu")
    first = engine(images(1), generator=seeded(), **CALL).frames
    engine.close()
    assert torch.equal(engine(images(1), generator=seeded(), **CALL).frames, first)


def test_the_callback_receives_only_what_it_asked_for(tiny_engine: VideoEngine) -> None:
    seen: list[list[str]] = []

    def callback(engine: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert engine is tiny_engine
        seen.append(list(tensors))
        return tensors

    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [], **CALL}
    tiny_engine(images(1), generator=seeded(), **call)
    assert seen == [[], []]


# Guidance in one call or in two


def test_the_halves_one_after_the_other_equal_both_at_once(tiny_engine: VideoEngine) -> None:
    """Guidance commutes with the preconditioning; the pipeline then needs half the memory."""
    import dataclasses

    at_once = tiny_engine(images(1), generator=seeded(), **CALL).frames
    source = tiny_engine.source
    halves = dataclasses.replace(
        source,
        planner=None,
        profile_for=lambda s, n: dataclasses.replace(source.profile_for(s, n), guidance="single"),
    )
    result = VideoEngine(halves)(images(1), generator=seeded(), **CALL)
    assert "single" in result.report.profile
    assert float((result.frames - at_once).abs().max()) <= 1e-4


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 14}, rf"got 14 frames of {HEIGHT}x{WIDTH}"),
        ({"height": 64}, rf"got {FRAMES} frames of 64x{WIDTH}"),
        ({"decode_chunk_size": 1}, "decode chunk 1"),
    ],
    ids=str,
)
def test_what_a_static_bundle_cannot_do(tiny_bundle: Path, change: dict[str, Any], message: str) -> None:
    """Names the profiles that there are and the export command that would do it."""
    with (
        VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine,
        pytest.raises(ProfileError, match=message) as caught,
    ):
        engine(images(1), **{**CALL, **change})
    assert f"{FRAMES} frames, {HEIGHT}x{WIDTH}, batch 1, batched guidance, decode chunk {CHUNK}" in str(
        caught.value
    )
    assert "run: svd-export onnx" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_type": "gif"}, r"output_type: expected pil, np, pt, latent, got 'gif'"),
        (
            {"callback_on_step_end_tensor_inputs": ["noise"]},
            r"callback_on_step_end_tensor_inputs: expected lat",
        ),
        ({"generator": "seed"}, r"generator: expected a torch.Generator, .* got str"),
        ({"generator": [seeded(), seeded()]}, r"generator: .* a list of 1 .* got a list of 2"),
        ({"generator": [None]}, r"generator: .* got a list of 1"),
        ({"fit": "cover"}, r"fit: expected stretch, crop, pad, got 'cover'"),
        ({"output_type": None}, r"output_type: expected pil, np, pt, latent, got None"),
        ({"sigmas": 3.0}, r"sigmas: expected a list of numbers, got 3\.0"),
        ({"sigmas": []}, r"sigmas: expected two or more finite noise levels"),
        ({"latents": np.zeros((1, FRAMES, 4, 16, 24))}, r"latents: expected shape .* got no tensor: ndarray"),
        ({"latents": [0.0]}, r"latents: expected shape .* got no tensor: list"),
        ({"callback_on_step_end": "print"}, r"callback_on_step_end: expected a function of .* got str"),
        (
            {"callback_on_step_end_tensor_inputs": "latents"},
            r"callback_on_step_end_tensor_inputs: .* got 'la",
        ),
        ({"callback_on_step_end_tensor_inputs": None}, r"callback_on_step_end_tensor_inputs: .* got None"),
        ({"height": 33}, r"height: expected a multiple of 4 pixels, got 33\. The nearest that works is 32"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,  # no addresses: workers differ
)
def test_impossible_arguments(tiny_engine: VideoEngine, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_engine(images(1), **{**CALL, **change})


def test_an_unknown_dtype_is_refused(tiny_checkpoint: Path) -> None:
    for dtype in ("int8", torch.int8, None):
        with pytest.raises(SettingsError, match=r"dtype: expected fp32, fp16, bf16, got "):
            VideoEngine.from_checkpoint(str(tiny_checkpoint), dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", [0, None, torch.device("meta"), torch.device("cpu", 1)])
def test_an_impossible_device_is_refused(tiny_checkpoint: Path, device: Any) -> None:
    with pytest.raises(SettingsError, match="device: expected auto, cpu, cuda or cuda:N"):
        VideoEngine.from_checkpoint(str(tiny_checkpoint), device=device)


def test_what_is_no_place_of_a_checkpoint_or_bundle(diffusers_pipeline: Any) -> None:
    """A pipeline of diffusers, say."""
    for opened in (VideoEngine.from_checkpoint, VideoEngine.from_bundle):
        with pytest.raises(
            SettingsError, match="got an object of type StableVideoDiffusionPipeline"
        ) as caught:
            opened(diffusers_pipeline)
        assert "save_pretrained(FOLDER)" in caught.value.remedy


# Half precision on the CPU, and reproducibility


@pytest.mark.parametrize(("dtype", "psnr"), [("bf16", 25.0), ("fp16", 40.0)])
def test_half_precision_stays_near(tiny_checkpoint: Path, dtype: str, psnr: float) -> None:
    """A few rounding errors, not another video: PSNR against float32 on the same seed."""

    def frames(kind: str) -> np.ndarray:
        with VideoEngine.from_checkpoint(
            str(tiny_checkpoint), backend="eager", device="cpu", dtype=kind
        ) as e:
            result = e(images(1), generator=seeded(), **{**CALL, "output_type": "np"})
        if kind == dtype:
            found = {stage: where.dtype for stage, where in result.report.stages.items()}
            assert found.pop("vae_encoder") == "float32"
            assert set(found.values()) == {{"bf16": "bfloat16", "fp16": "float16"}[dtype]}
        return result.frames

    error = float(np.mean((frames("fp32") - frames(dtype)) ** 2))
    assert -10 * np.log10(error) >= psnr


def test_two_processes_give_the_same_frames(tiny_bundle: Path, tmp_path: Path) -> None:
    photograph = tmp_path / "image.png"
    Image.fromarray((images(1)[0] * 255).byte().permute(1, 2, 0).numpy()).save(photograph)

    def frames(name: str) -> list[bytes]:
        script = "from svd_engine.cli.main import main; main()"
        command = [sys.executable, "-c", script, "generate", str(photograph), "-o", str(tmp_path / name)]
        command += ["--bundle", str(tiny_bundle), "--steps", "2", "--seed", "0", "--device", "cpu"]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ, capture_output=True)
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    first = frames("first")
    assert len(first) == FRAMES
    assert first == frames("second")


# Rewrites


def test_rewrites_are_on_by_default_and_reported(tiny_engine: VideoEngine, tiny_checkpoint: Path) -> None:
    on = tiny_engine(images(1), generator=seeded(), **CALL).report
    assert on.rewrites["unet/single-token-cross-attention"] > 0
    assert on.rewrites["vae/resnet-blend"] > 0
    assert on.without_rewrites == []
    without = ["phase-upsample", "resnet-blend"]
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", without_rewrites=without) as engine:
        off = engine(images(1), generator=seeded(), **CALL).report
    assert off.without_rewrites == without
    assert not {name for name in off.rewrites if name.endswith(tuple(without))}


def test_an_unknown_rewrite_is_refused_before_anything_is_loaded(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"rewrite magic: expected one of .*phase-upsample.* Correct the name"
    ):
        VideoEngine.from_checkpoint(str(tiny_checkpoint), without_rewrites=["magic"])


def test_a_rewrite_that_would_not_run_cannot_be_left_out(tiny_checkpoint: Path) -> None:
    """Those for torch on a CPU are no part of an export: naming one there would change nothing."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    with pytest.raises(SettingsError, match=r"rewrite channels-last: expected one of .* no rewrite has here"):
        Modules(checkpoint, without_rewrites=["channels-last"])
    with VideoEngine.from_checkpoint(
        checkpoint, backend="eager", device="cpu", without_rewrites=["channels-last"]
    ) as engine:
        report = engine(images(1), generator=seeded(), **CALL).report
    assert "unet/linear-as-convolution" in report.rewrites
    assert "unet/channels-last" not in report.rewrites
