"""Progress and previews of a call: what a watch knows while it runs."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from svd_engine import ImageConditioning
from svd_engine.errors import SettingsError
from svd_engine.media.image import load_image, to_vae_pixels
from svd_engine.serving import preview
from svd_engine.serving.encode import encode
from svd_engine.serving.one_video import VideoRequest
from svd_engine.serving.watch import Progress, Watch
from tests.engine.test_engine import seeded
from tests.engine.watching import FAKE_CALL, fake_engine
from tests.support.paths import PHOTOGRAPH


def test_a_preview_of_an_encoded_photograph_looks_like_it() -> None:
    """A latent that is a linear image of the photograph, with noise in the fourth channel, is undone."""
    pixels = to_vae_pixels(load_image(PHOTOGRAPH), 64, 96)
    small = functional.adaptive_avg_pool2d(pixels, (8, 12))
    mixed = torch.einsum("nchw,cd->ndhw", small, torch.randn(3, 3, generator=torch.manual_seed(0))) + 0.3
    latent = torch.cat([mixed, torch.randn(1, 1, 8, 12)], dim=1)
    shown = preview.project(latent, preview.fit(pixels, latent))
    assert float((shown - (small / 2 + 0.5)).abs().max()) < 1e-3


def test_a_preview_of_nan_is_grey() -> None:
    shown = preview.project(torch.full((2, 4, 3, 5), torch.nan), torch.ones(5, 3))
    assert torch.equal(shown, torch.full((2, 3, 3, 5), 0.5))


def test_a_watch_counts_and_shows_every_second_step() -> None:
    engine, _ = fake_engine()
    told: list[tuple[int, bool]] = []
    watch = Watch(engine.model.latent_scale, 2, lambda done, shown: told.append((done, shown is not None)))
    pixels = to_vae_pixels(load_image(PHOTOGRAPH), 64, 128)
    engine(pixels / 2 + 0.5, generator=seeded(), observer=watch, **FAKE_CALL)
    assert told == [(1, False), (2, True), (3, False)]
    assert watch.progress == Progress(
        "postprocess", step=3, steps=3, evaluation=3, evaluations=3, network_calls=8, decoded=5, frames=5
    )
    assert watch.preview is not None
    assert (watch.preview.shape, watch.preview.dtype) == ((5, 8, 16, 3), np.uint8)


def test_a_preview_shows_the_estimate_in_the_encoder_s_scale() -> None:
    """The fake denoiser's estimate is about the first latent, unscaled: scale 1 shows the photograph."""
    engine, _ = fake_engine()
    pixels = to_vae_pixels(load_image(PHOTOGRAPH), 64, 128)
    far = {}
    for scale in (1.0, engine.model.latent_scale):
        watch = Watch(scale, 3)
        engine(
            pixels / 2 + 0.5, generator=seeded(), observer=watch, min_guidance_scale=1.0,
            max_guidance_scale=1.0, noise_aug_strength=0.0, motion_bucket_id=0, fps=1, **FAKE_CALL,
        )  # fmt: skip
        assert watch.preview is not None
        small = functional.adaptive_avg_pool2d(pixels, (8, 16))[0].permute(1, 2, 0) / 2 + 0.5
        far[scale] = float(np.abs(watch.preview[0] / 255 - small.numpy()).mean())
    assert far[1.0] < 0.05 < far[engine.model.latent_scale]


def test_an_image_that_was_encoded_before_is_previewed_by_its_pixels() -> None:
    engine, _ = fake_engine()
    pixels = to_vae_pixels(load_image(PHOTOGRAPH), 64, 128)
    latent = torch.cat([functional.adaptive_avg_pool2d(pixels, (8, 16)), torch.zeros(1, 1, 8, 16)], dim=1)
    embedding = torch.zeros(1, 1, engine.model.architecture.embedding_dim)
    watch = Watch(engine.model.latent_scale, 1)
    engine(ImageConditioning(embedding, latent, pixels), observer=watch, **FAKE_CALL)
    assert watch.preview is not None
    assert watch.preview.shape == (5, 8, 16, 3)
    with pytest.raises(SettingsError, match=r"preview_every: expected 0 with an .*got 1\. Pass ImageC"):
        VideoRequest(ImageConditioning(embedding, latent), 0, preview_every=1)
    with pytest.raises(SettingsError, match=r"pixels of an ImageC.*\[1, 3, 64, 128\], got \[1, 3, 32, 64\]"):
        engine(ImageConditioning(embedding, latent, pixels[..., ::2, ::2]), **FAKE_CALL)


def test_without_previews_a_watch_holds_no_picture() -> None:
    engine, _ = fake_engine()
    watch = Watch(engine.model.latent_scale)
    assert watch.progress == Progress()
    engine(torch.full((1, 3, 64, 128), 0.5), observer=watch, **FAKE_CALL)
    assert watch.preview is None
    assert watch._colours is None


def test_frames_become_the_content_of_a_file() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode(frames, ".webp", 7))) as shown:
        assert (shown.format, shown.size, getattr(shown, "n_frames", 1)) == ("WEBP", (16, 8), 3)
    assert encode(frames, ".mp4", 7)[4:8] == b"ftyp"
