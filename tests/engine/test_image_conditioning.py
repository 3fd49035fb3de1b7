"""A call with what encoders of the caller's own gave, in the place of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine import ImageConditioning, VideoEngine, pipeline
from svd_engine.errors import SettingsError
from tests.conftest import FRAMES, HEIGHT, WIDTH

CALL: dict[str, Any] = {
    "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "latent",
    "num_videos_per_prompt": 2,
}  # fmt: skip
EMBEDDING, LATENT = torch.ones(1, 1, 32), torch.ones(1, 4, HEIGHT // 2, WIDTH // 2)  # of the tiny checkpoint


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[VideoEngine]:
    with VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu") as opened:
        opened.set_progress_bar_config(disable=True)
        yield opened


def test_the_same_latents_as_of_the_images_and_no_encoder(
    engine: VideoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two videos of each of two images, of tensors of another dtype."""
    images = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(4, FRAMES, 4, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(2))
    seen: list[ImageConditioning] = []
    encode = pipeline.encode

    def keeping(*arguments: Any) -> ImageConditioning:
        seen.append(encode(*arguments))
        return seen[-1]

    monkeypatch.setattr(pipeline, "encode", keeping)
    expected = engine(images, latents=noise, **CALL).frames
    given = ImageConditioning(seen[0].embedding.double(), seen[0].first_latent.double())
    engine.close()

    opened: list[str] = []
    open_network = engine.backend.open
    monkeypatch.setattr(
        engine.backend, "open", lambda spec: (opened.append(spec.network), open_network(spec))[1]
    )
    result = engine(given, latents=noise, **CALL)
    torch.testing.assert_close(result.frames, expected, rtol=0, atol=1e-5)
    assert not torch.equal(result.frames[0], result.frames[2])
    assert "denoiser" in opened
    assert set(opened).isdisjoint({"image_encoder", "vae_encoder"})
    assert set(result.report.stages).isdisjoint({"image_encoder", "vae_encoder"})
    assert set(result.report.stage_ms).isdisjoint({"image_encoder", "vae_encoder"})
    assert len(seen) == 1


def test_frames_come_out_too(engine: VideoEngine) -> None:
    frames = engine(ImageConditioning(EMBEDDING, LATENT), **CALL | {"output_type": "pt"}).frames
    assert frames.shape == (2, FRAMES, 3, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("embedding", "latent", "message"),
    [
        (EMBEDDING[0], LATENT, r"embedding of an ImageC.* a tensor \[1, 1, 32\], got \[1, 32\]\. Encode the"),
        (EMBEDDING, LATENT[..., 1:], r"first_latent of .* a tensor \[1, 4, 16, 24\], got \[1, 4, 16, 23\]"),
        (EMBEDDING.repeat(2, 1, 1), LATENT, r"first_latent of .* a tensor \[2, 4, 16, 24\], got \[1, 4, 16"),
        (EMBEDDING[:0], LATENT[:0], r"embedding of .* expected one image or more, got \[0, 1, 32\]"),
        (EMBEDDING.numpy(), LATENT, r"embedding of .* got no tensor: ndarray"),
        (EMBEDDING, None, r"first_latent of .* got no tensor: NoneType"),
        (EMBEDDING.long(), LATENT, r"embedding of .* expected finite real numbers, got torch\.int64"),
        (EMBEDDING, LATENT.to(torch.complex64), r"first_latent of .* got torch\.complex64"),
        (EMBEDDING, LATENT * float("nan"), r"first_latent of .* got NaN or infinity in them\. Encode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_is_refused_before_networks_are_opened(
    engine: VideoEngine, monkeypatch: pytest.MonkeyPatch, embedding: Any, latent: Any, message: str
) -> None:
    monkeypatch.setattr(engine.backend, "open", lambda _: pytest.fail("opened before the refusal"))
    with pytest.raises(SettingsError, match=message):
        engine(ImageConditioning(embedding, latent), **CALL)


def test_fit_would_do_nothing(engine: VideoEngine) -> None:
    with pytest.raises(
        SettingsError, match=r"fit: expected its default beside an ImageCond.* got crop\. Leave"
    ):
        engine(ImageConditioning(EMBEDDING, LATENT), fit="crop", **CALL)


def test_noise_is_the_first_that_the_generator_gives(engine: VideoEngine) -> None:
    """None of it goes into an image."""

    def latents(**start: Any) -> Tensor:
        conditioning = ImageConditioning(EMBEDDING, LATENT)
        result: Tensor = engine(conditioning, **CALL | {"num_videos_per_prompt": 1}, **start).frames
        return result

    noise = torch.randn(1, FRAMES, 4, HEIGHT // 2, WIDTH // 2, generator=torch.manual_seed(5))
    assert torch.equal(latents(generator=torch.manual_seed(5)), latents(latents=noise))
