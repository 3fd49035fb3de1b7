"""What a call tells its observer, on the fake backend."""

from __future__ import annotations

import dataclasses
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine.observer import Observer, Step
from svd_engine.spec.profile import Profile
from tests.engine.test_engine import seeded
from tests.engine.test_pipeline import PROFILE, SETTINGS, run
from tests.engine.watching import FAKE_CALL, Stops, fake_engine

IMAGE = torch.full((1, 3, 64, 128), 0.5)


class Notes(Observer):
    """Writes down everything."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.steps: list[Step] = []
        self.first: tuple[Tensor, Tensor] | None = None

    def on_stage_begin(self, stage: str) -> None:
        self.told.append(f"begin {stage}")

    def on_stage_end(self, stage: str) -> None:
        self.told.append(f"end {stage}")

    def on_network_run(self, network: str) -> None:
        self.told.append(network)

    def on_first_latent(self, pixels: Tensor, latent: Tensor) -> None:
        self.told.append("first latent")
        self.first = pixels, latent

    def on_step(self, step: Step) -> None:
        self.told.append(f"step {step.index} of {step.steps}")
        self.steps.append(dataclasses.replace(step, denoised=step.denoised.clone()))


def test_the_story_of_a_call() -> None:
    engine, _ = fake_engine()
    notes = Notes()

    def callback(_: Any, step: int, __: Any, tensors: Any) -> Any:
        notes.told.append(f"callback {step}")
        return tensors

    watched = engine(IMAGE, generator=seeded(), observer=notes, callback_on_step_end=callback, **FAKE_CALL)
    steps = [[told, f"step {i} of 3", f"callback {i}"] for i, told in enumerate(["denoiser"] * 3)]
    assert notes.told == [
        "begin preprocess", "end preprocess", "begin load", "end load",
        "begin image_encoder", "image_encoder", "end image_encoder",
        "begin vae_encoder", "vae_encoder", "end vae_encoder", "first latent",
        "begin denoiser", *chain(*steps), "end denoiser",
        "begin vae_decoder", *["vae_decoder"] * 3, "end vae_decoder",
        "begin postprocess", "end postprocess",
    ]  # fmt: skip
    stages = [told.removeprefix("end ") for told in notes.told if told.startswith("end ")]
    assert stages == list(watched.report.stage_ms)
    assert torch.equal(watched.frames, engine(IMAGE, generator=seeded(), **FAKE_CALL).frames)


def test_decoded_frames_are_told_after_each_chunk() -> None:
    engine, _ = fake_engine()
    watching = Stops(after=99)
    generators = [seeded(), seeded()]
    engine(IMAGE, num_videos_per_prompt=2, generator=generators, observer=watching, **FAKE_CALL)
    assert watching.told == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]


def test_own_sigmas_tell_the_steps_that_run() -> None:
    engine, _ = fake_engine()
    notes = Notes()
    engine(IMAGE, sigmas=[10.0, 1.0, 0.0], observer=notes, output_type="latent")
    assert [(step.index, step.steps) for step in notes.steps] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("profile", [PROFILE, dataclasses.replace(PROFILE, guidance="single")])
def test_the_estimate_of_the_last_step_is_the_video(profile: Profile) -> None:
    """A step to sigma = 0 lands on D(x; sigma) itself, with guidance and for every video."""
    notes = Notes()
    latents, _ = run(profile, images=2, decode=False, observer=notes)
    assert latents.shape[0] == 2
    torch.testing.assert_close(notes.steps[-1].denoised, latents)
    assert not torch.equal(notes.steps[0].denoised, notes.steps[-1].denoised)


def test_the_first_latent_comes_with_the_pixels_that_were_encoded() -> None:
    notes = Notes()
    run(images=2, observer=notes, settings=dataclasses.replace(SETTINGS, videos_per_image=2))
    assert notes.first is not None
    pixels, latent = notes.first
    assert (pixels.shape, latent.shape) == ((2, 3, 64, 128), (2, 4, 8, 16))
    small = torch.nn.functional.adaptive_avg_pool2d(pixels, (8, 16))
    torch.testing.assert_close(latent[:, :3], small)  # what the fake encoder does


@pytest.mark.parametrize("method", [
    "on_stage_begin", "on_stage_end", "on_network_run", "on_step", "on_decoding",
])  # fmt: skip
def test_what_an_observer_raises_ends_the_call(method: str) -> None:
    engine, _ = fake_engine()

    class Broken(Observer):
        def __getattribute__(self, name: str) -> Any:
            if name == method:
                raise KeyError("the observer's own")
            return super().__getattribute__(name)

    with pytest.raises(KeyError, match="the observer's own"):
        engine(IMAGE, observer=Broken(), **FAKE_CALL)
    alone = engine(IMAGE, generator=seeded(), **FAKE_CALL).frames
    assert torch.equal(engine(IMAGE, generator=seeded(), observer=Observer(), **FAKE_CALL).frames, alone)


def test_a_stage_that_fails_does_not_end() -> None:
    engine, backend = fake_engine()
    notes = Notes()
    backend.ran = lambda network: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        engine(IMAGE, observer=notes, **FAKE_CALL)
    assert notes.told[-1] == "begin image_encoder"
