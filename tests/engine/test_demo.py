"""The checkpoint that ships: small, plain diffusers' own layout, and it animates a photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image

from svd_bench.quality.evaluate import reconstructions
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import contrast_kept
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import DEMO_FOLDER, open_checkpoint
from svd_engine.media.motion import optical_flow, psnr, speeds
from tests.support.paths import ROOT

HEIGHT, WIDTH = 128, 224


@pytest.fixture(scope="module")
def photograph() -> Image:
    return held_out(HEIGHT, WIDTH)["coffee"]


@pytest.fixture(scope="module")
def clips(photograph: Image, demo_bundle: Path) -> dict[int, np.ndarray]:
    """Eight steps at two motion buckets."""
    made = {}
    with VideoEngine.from_bundle(demo_bundle, backend="onnxruntime", device="cpu") as engine:
        for bucket in (20, 220):
            generator = torch.Generator().manual_seed(0)
            made[bucket] = engine(
                photograph, motion_bucket_id=bucket, num_inference_steps=8, generator=generator,
                output_type="np",
            ).frames[0]  # fmt: skip
    return made


def test_it_fits_into_a_package() -> None:
    files = [f for f in DEMO_FOLDER.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 12_000_000
    assert {f.suffix for f in files} == {".json", ".safetensors", ".md"}


def test_the_model() -> None:
    model = open_checkpoint("demo").model
    assert (model.name, model.frames, model.height, model.width) == ("demo", 14, HEIGHT, WIDTH)
    assert (model.architecture.vae_scale, model.architecture.latent_channels) == (8, 4)
    assert not model.random_weights
    assert (model.min_guidance_scale, model.max_guidance_scale) == (1.0, 1.5)  # what its card recommends
    assert "`max_guidance_scale` 1.5" in (DEMO_FOLDER / "README.md").read_text()


def test_the_lines_of_its_card_run_in_plain_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    _, code, *_ = (DEMO_FOLDER / "README.md").read_text().split("```")
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(code.removeprefix("python\n"), names)
    assert [frame.size for frame in names["frames"]] == [(WIDTH, HEIGHT)] * 14
    contrast = np.asarray(names["frames"][-1]).std()
    assert contrast > 20  # of 255; a failed one is grey or black


def test_plain_diffusers_loads_it_and_makes_the_same_frames(photograph: Image) -> None:
    from diffusers import StableVideoDiffusionPipeline

    pipeline = StableVideoDiffusionPipeline.from_pretrained(DEMO_FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "height": 64, "width": 96, "num_frames": 4, "num_inference_steps": 3, "output_type": "pt",
        "max_guidance_scale": 1.5,
    }  # fmt: skip
    image = photograph.resize((96, 64))
    theirs = pipeline(image, generator=torch.Generator().manual_seed(0), **settings).frames
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu") as engine:
        ours = engine(image, generator=torch.Generator().manual_seed(0), **settings).frames
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_the_autoencoder_on_photographs_that_it_never_saw() -> None:
    pairs = reconstructions(open_checkpoint("demo"), held_out(HEIGHT, WIDTH))
    assert np.mean([psnr(*pair) for pair in pairs.values()]) >= 23


def test_the_first_frame_is_the_photograph(clips: dict[int, np.ndarray], photograph: Image) -> None:
    (pair,) = reconstructions(open_checkpoint("demo"), {"coffee": photograph}).values()
    assert psnr(clips[20][:1], pair[1]) >= 20  # after 8 of 25 steps


def test_it_moves_and_faster_in_a_higher_bucket(clips: dict[int, np.ndarray]) -> None:
    slow, fast = (float(speeds(optical_flow(clips[bucket])).mean()) for bucket in (20, 220))
    assert fast >= 1.5 * slow
    assert fast > 0.3  # pixels a frame


def test_it_keeps_its_contrast(clips: dict[int, np.ndarray]) -> None:
    assert all(np.isfinite(clip).all() and contrast_kept(clip) >= 0.7 for clip in clips.values())


SMALL = {"num_frames": 4, "height": 64, "width": 96}  # of `demo_half_bundle`


def four_steps(engine: VideoEngine, photograph: Image) -> np.ndarray:
    frames: np.ndarray = engine(
        photograph, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np",
        **SMALL,
    ).frames[0]  # fmt: skip
    return frames


@pytest.fixture(scope="module")
def exact(photograph: Image) -> np.ndarray:
    """float32, eager, four steps: what the same small clip is compared with in other precisions."""
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu", dtype="fp32") as engine:
        return four_steps(engine, photograph)


def test_onnx_runtime_makes_nearly_the_same_clip_in_half_precision(
    photograph: Image, exact: np.ndarray, demo_half_bundle: Path
) -> None:
    with VideoEngine.from_bundle(demo_half_bundle, backend="onnxruntime", device="cpu") as engine:
        assert psnr(exact, four_steps(engine, photograph)) >= 40


def test_bfloat16_makes_nearly_the_same_clip(photograph: Image, exact: np.ndarray) -> None:
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu", dtype="bf16") as engine:
        assert psnr(exact, four_steps(engine, photograph)) >= 25


def test_samplers_of_higher_order_come_nearer_to_many_steps() -> None:
    """Between noise levels 10 and 1.  From 700 to 0 a few steps are too long for that: docs/samplers.md."""
    image = held_out(32, 64)["coffee"]
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu") as engine:

        def made(sampler: str, steps: int) -> torch.Tensor:
            return engine(
                image, height=32, width=64, num_frames=2, sampler=sampler, output_type="latent",
                sigmas=np.geomspace(10, 1, steps + 1), generator=torch.Generator().manual_seed(0),
            ).frames  # fmt: skip

        many = made("euler", 32)

        def distance(sampler: str, steps: int) -> float:
            return float((made(sampler, steps) - many).square().mean().sqrt())

        assert distance("dpmpp-2m", 8) < distance("euler", 8) / 2
        assert distance("heun", 6) < distance("heun", 3) / 3.5  # second order: 4
