"""Each published constant, got wrong on purpose, must show: otherwise the parity tests prove nothing.

The noise levels are small, because at sigma 700 the terms with 1 in them vanish in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine import VideoEngine, pipeline
from svd_engine.networks import modules
from svd_engine.networks.denoiser import GuidedDenoiser
from svd_engine.sampling import preconditioning
from tests.conftest import FRAMES, HEIGHT, WIDTH

CALL: dict[str, Any] = {
    "num_frames": FRAMES,
    "height": HEIGHT,
    "width": WIDTH,
    "sigmas": [1.5, 0.6, 0.0],
    "noise_aug_strength": 0.2,
    "min_guidance_scale": 1.0,
    "max_guidance_scale": 4.0,
    "output_type": "pt",
}
Mistake = Callable[[pytest.MonkeyPatch, VideoEngine, dict[str, Any]], None]


def fps_not_minus_one(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    call["fps"] = 8  # 7 would have been told to the network


def c_noise_without_the_quarter(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    patch.setattr(preconditioning, "c_noise", lambda sigma: sigma.log())


def halves_swapped(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    class Swapped(GuidedDenoiser):
        def predict(self, *inputs: Tensor) -> Tensor:
            return torch.cat(super().predict(*inputs).chunk(2)[::-1])

    patch.setitem(modules._WRAPPERS, ("denoiser", "batched"), Swapped)


def guidance_falls(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    linspace = torch.linspace
    patch.setattr(pipeline.torch, "linspace", lambda low, high, n, **kw: linspace(high, low, n, **kw))


def guidance_constant(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    call["min_guidance_scale"] = call["max_guidance_scale"]


def no_noise_on_the_first_frame(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    draw = pipeline.draw

    def without(shape: torch.Size, *rest: Any) -> Tensor:
        return draw(shape, *rest) * (len(shape) == 5)

    patch.setattr(pipeline, "draw", without)


def first_latent_scaled(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    in_batches = pipeline.in_batches

    def scaled(network: Any, batch: int, **inputs: Tensor) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = in_batches(network, batch, **inputs)
        if network.spec.network != "vae_encoder":
            return outputs
        return {"latent": outputs["latent"] * engine.model.latent_scale}

    patch.setattr(pipeline, "in_batches", scaled)


def latent_scale_off(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    engine.model = dataclasses.replace(engine.model, latent_scale=0.13025)  # SDXL's


def initial_scale_is_sigma(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    patch.setattr(pipeline, "initial_scale", lambda sigmas: sigmas[0])


def c_skip_of_another_sigma_data(
    patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]
) -> None:
    patch.setattr(preconditioning, "c_skip", lambda sigma: 0.25 / (sigma**2 + 0.25))


def epsilon_instead_of_v(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    patch.setattr(preconditioning, "c_out", lambda sigma: -sigma)


def one_draw_too_many(patch: pytest.MonkeyPatch, engine: VideoEngine, call: dict[str, Any]) -> None:
    torch.randn(1, generator=call["generator"])


MISTAKES: list[Mistake] = [
    fps_not_minus_one,
    c_noise_without_the_quarter,
    halves_swapped,
    guidance_falls,
    guidance_constant,
    no_noise_on_the_first_frame,
    first_latent_scaled,
    latent_scale_off,
    initial_scale_is_sigma,
    c_skip_of_another_sigma_data,
    epsilon_instead_of_v,
    one_draw_too_many,
]


@pytest.fixture(scope="module")
def expected(diffusers_pipeline: Any) -> Tensor:
    frames: Tensor = diffusers_pipeline(image(), generator=seeded(), **CALL).frames
    return frames


def image() -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def difference(checkpoint: Path, expected: Tensor, mistake: Mistake | None) -> float:
    call = {**CALL, "generator": seeded()}
    with (
        pytest.MonkeyPatch.context() as patch,
        VideoEngine.from_checkpoint(str(checkpoint), backend="eager", device="cpu") as engine,
    ):
        if mistake is not None:
            mistake(patch, engine, call)
        return float((engine(image(), **call).frames - expected).abs().max())


def test_without_a_mistake_there_is_no_difference(tiny_checkpoint: Path, expected: Tensor) -> None:
    assert difference(tiny_checkpoint, expected, None) <= 1e-5


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_shows(tiny_checkpoint: Path, expected: Tensor, mistake: Mistake) -> None:
    assert difference(tiny_checkpoint, expected, mistake) > 1e-4
