"""The pipeline's own logic, on the fake backend: order of calls, grouping of rows, guidance, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine import pipeline
from svd_engine.backends.fake import FakeBackend
from svd_engine.clock import Clock
from svd_engine.errors import NonFiniteOutput, SettingsError
from svd_engine.request import Settings
from svd_engine.spec.model import Architecture, Model
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import image_encoder, specs_of
from svd_engine.spec.tensors import NetworkSpec

ARCH = Architecture(clip_size=16, embedding_dim=8)
MODEL = Model(
    name="fake",
    architecture=ARCH,
    frames=5,
    height=64,
    width=128,
    sigma_min=0.002,
    sigma_max=700.0,
    latent_scale=0.18215,
    clip_mean=(0.5, 0.5, 0.5),
    clip_std=(0.2, 0.2, 0.2),
    random_weights=True,
)
PROFILE = Profile(frames=5, height=64, width=128, decode_chunk=2)
SETTINGS = Settings(frames=5, height=64, width=128, steps=3)


def stages_of(backend: FakeBackend, profile: Profile) -> pipeline.Stages:
    image, vae, denoiser, *decoders = [backend.open(spec) for spec in specs_of(profile, ARCH, FLOAT32)]
    return pipeline.Stages(profile, image, vae, denoiser, {d.spec.inputs[0].shape[0]: d for d in decoders})


def run(
    profile: Profile = PROFILE, settings: Settings = SETTINGS, images: int = 1, **change: Any
) -> tuple[Tensor, list[str]]:
    """The frames, or what `decode` off gives, and the networks in the order of their calls."""
    backend = FakeBackend()
    generator = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {
        "image": pipeline.ImagePixels(
            vae=torch.linspace(-1, 1, images * 3 * 64 * 128).reshape(images, 3, 64, 128),
            clip=torch.linspace(-2, 2, images * 3 * 16 * 16).reshape(images, 3, 16, 16),
        ),
        "generator": generator,
        "latents": None,
        "on_step": lambda step, timestep, x: x,
        "clock": Clock(torch.device("cpu")),
    }
    result = pipeline.generate(stages_of(backend, profile), MODEL, settings, **{**call, **change})
    return result, backend.calls


def test_the_order_of_the_story() -> None:
    frames, calls = run()
    assert calls == ["image_encoder", "vae_encoder", *["denoiser"] * 3, *["vae_decoder"] * 3]
    assert frames.shape == (1, 5, 3, 64, 128)
    assert 0 <= float(frames.min()) < float(frames.max()) <= 1


def test_latents_need_no_decoder() -> None:
    latents, calls = run(decode=False)
    assert latents.shape == (1, 5, 4, 8, 16)
    assert "vae_decoder" not in calls


@pytest.mark.parametrize(("batch", "calls_a_step"), [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_any_number_of_videos_over_any_batch(batch: int, calls_a_step: int) -> None:
    """Three videos through engines made for `batch`: the same frames as three through a batch of three."""
    profile = dataclasses.replace(PROFILE, batch=batch)
    frames, calls = run(profile, images=3)
    expected, _ = run(dataclasses.replace(PROFILE, batch=3), images=3)
    assert calls.count("denoiser") == 3 * calls_a_step
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-6)


def test_videos_of_one_image_stand_side_by_side() -> None:
    """Images A, B with two videos each come out as A A B B, each with noise of its own."""
    settings = dataclasses.replace(SETTINGS, videos_per_image=2, noise_aug_strength=0.0)
    seen: list[Tensor] = []
    latents, _ = run(
        settings=settings, images=2, decode=False, on_step=lambda step, t, x: seen.append(x.clone()) or x
    )
    start = seen[0]
    assert latents.shape[0] == 4
    assert all(not torch.equal(start[i], start[j]) for i in range(4) for j in range(i))
    a, _, b, _ = latents.mean(dim=(1, 2, 3, 4))  # the fake denoiser lands near the first latent
    torch.testing.assert_close(latents[0].mean(), latents[1].mean(), rtol=0.05, atol=1e-3)
    assert abs(float(a - b)) > 0.1


def test_single_guidance_takes_two_calls_only_when_guided() -> None:
    single = dataclasses.replace(PROFILE, guidance="single")
    _, guided = run(single)
    _, unguided = run(single, dataclasses.replace(SETTINGS, max_guidance_scale=1.0))
    assert (guided.count("denoiser"), unguided.count("denoiser")) == (6, 3)


def test_time_ids_and_guidance_reach_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}
    from svd_engine.backends import fake

    original = fake.FUNCTIONS["denoiser"]

    def spy(inputs: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
        seen.update({name: tensor.clone() for name, tensor in inputs.items()})
        return original(inputs, spec)

    monkeypatch.setitem(fake.FUNCTIONS, "denoiser", spy)
    run(settings=dataclasses.replace(SETTINGS, fps=12, motion_bucket_id=33, noise_aug_strength=0.5))
    assert seen["time_ids"].tolist() == [[11.0, 33.0, 0.5]]
    assert seen["guidance"].tolist() == [[1.0, 1.5, 2.0, 2.5, 3.0]]
    run(settings=dataclasses.replace(SETTINGS, min_guidance_scale=0.2, max_guidance_scale=0.9))
    assert seen["guidance"].tolist() == [[1.0] * 5]  # at most 1 means none, as in diffusers


def test_a_network_that_gives_nan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from svd_engine.backends import fake

    for network, original in dict(fake.FUNCTIONS).items():

        def broken(inputs: Any, spec: NetworkSpec, original: Any = original) -> dict[str, Tensor]:
            ((name, output),) = original(inputs, spec).items()
            spoilt = output.clone()
            spoilt.view(-1)[0] = float("nan")
            return {name: spoilt}

        with monkeypatch.context() as patch:
            patch.setitem(fake.FUNCTIONS, network, broken)
            with pytest.raises(
                NonFiniteOutput,
                match=rf"output of {network} \(fake, float32\): expected finite .* got NaN .* Use dtype=",
            ):
                run()


def test_given_latents_of_another_shape_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"latents: expected shape \[1, 5, 4, 8, 16\], got \[1, 5, 4, 8, 8\]"
    ):
        run(latents=torch.zeros(1, 5, 4, 8, 8))


def test_outputs_may_be_written_over_by_the_next_call() -> None:
    """The contract allows a network one output buffer; several rows must not end up the same."""

    class OneBuffer(Network):
        buffer = torch.zeros(1, 1, 8)

        def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"embedding": self.buffer.copy_(inputs["pixels"].mean().expand(1, 1, 8))}

    network = OneBuffer(image_encoder(PROFILE, ARCH, FLOAT32), Placement("test", "cpu", "float32"))
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 3, 16, 16)
    embeddings = pipeline.in_batches(network, 1, pixels=pixels)["embedding"]
    assert embeddings[:, 0, 0].tolist() == [0.0, 1.0, 2.0]


def test_the_clock_has_every_stage_and_step() -> None:
    clock = Clock(torch.device("cpu"))
    run(clock=clock)
    assert list(clock.stages) == ["image_encoder", "vae_encoder", "denoiser", "vae_decoder"]
    assert len(clock.steps) == 3
    assert sum(clock.steps) <= clock.stages["denoiser"]
