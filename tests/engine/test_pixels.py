"""Pixels that the VAE and the image encoder read, against diffusers, and what cannot become them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as reference
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import CLIPImageProcessor

from svd_engine.errors import ImageError, SettingsError
from svd_engine.media.image import cover, fitted, load_image, to_clip_pixels, to_vae_pixels
from svd_engine.values import Fit
from tests.support.messages import complete
from tests.support.paths import PHOTOGRAPH
from tests.support.pictures import noise

CLIP = CLIPImageProcessor()
TOLERANCE = 1e-6


# ---------------------------------------------------------------------------- parity with diffusers


def vae_reference(images: object, height: int, width: int) -> torch.Tensor:
    return VideoProcessor(do_resize=True, vae_scale_factor=8).preprocess(images, height=height, width=width)


def clip_reference(images: object) -> torch.Tensor:
    """What diffusers' own _encode_image hands to the image encoder."""
    seen: list[torch.Tensor] = []

    class Encoder(torch.nn.Linear):
        def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
            seen.append(pixels)
            return SimpleNamespace(image_embeds=torch.zeros(len(pixels), 1024))

    pipe = SimpleNamespace(
        image_encoder=Encoder(1, 1), video_processor=VideoProcessor(), feature_extractor=CLIP
    )
    StableVideoDiffusionPipeline._encode_image(pipe, images, "cpu", 1, False)
    return seen[0]


def clip_pixels(images: object, size: int = 224) -> torch.Tensor:
    return to_clip_pixels(images, size, CLIP.image_mean, CLIP.image_std)  # type: ignore[arg-type]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(64, 128), (320, 576), (448, 640)])
def test_vae_pixels_of_pil_images_equal_diffusers(height: int, width: int) -> None:
    images = [load_image(PHOTOGRAPH), noise(100, 90), noise(height, width)]
    for image in images:
        close(to_vae_pixels(image, height, width), vae_reference(image, height, width))
    pixels = to_vae_pixels(images, height, width)
    close(pixels, vae_reference(images, height, width))
    assert pixels.shape == (3, 3, height, width)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(64, 128), (32, 48), (100, 300)])
def test_vae_pixels_of_tensors_equal_diffusers(size: tuple[int, int], dtype: torch.dtype) -> None:
    batch = torch.rand(2, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    close(to_vae_pixels(batch, 64, 128), vae_reference(batch, 64, 128).float())
    close(to_vae_pixels(batch[0], 64, 128), vae_reference(batch[0], 64, 128).float())


@pytest.mark.parametrize("size", [None, (576, 1024), (224, 224), (150, 700), (90, 100)])
def test_clip_pixels_of_pil_images_equal_diffusers(size: tuple[int, int] | None) -> None:
    photo = load_image(PHOTOGRAPH)
    image = photo if size is None else photo.resize(size[::-1])
    close(clip_pixels(image), clip_reference(image))
    mirrored = Image.fromarray(np.asarray(image)[:, ::-1])
    close(clip_pixels([image, mirrored]), clip_reference([image, mirrored]))


def test_a_clip_tensor_of_the_right_size_is_only_normalised_as_in_diffusers() -> None:
    batch = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    close(clip_pixels(batch), clip_reference(batch))


@pytest.mark.parametrize("target", [224, 32])
@pytest.mark.parametrize(
    "size",
    [(427, 640), (100, 90), (225, 226), (227, 224), (33, 31), (50, 700), (720, 1280), (2, 3), (224, 1000)],
)
def test_the_antialiased_resize_equals_diffusers_on_noise(size: tuple[int, int], target: int) -> None:
    """Noise is the hardest case; mean 0 and std 1/2 undo to_clip_pixels' normalisation."""
    image = noise(*size)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    theirs = reference._resize_with_antialiasing(pixels * 2.0 - 1.0, (target, target))
    close(to_clip_pixels(image, target, [0.5] * 3, [0.5] * 3), theirs)


# ---------------------------------------------------------------------------- beyond diffusers


def test_a_clip_tensor_of_another_size_is_resized_like_the_image() -> None:
    image = noise(90, 250)
    tensor = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(clip_pixels(tensor), clip_pixels(image))
    assert torch.equal(clip_pixels(tensor[None].repeat(2, 1, 1, 1)), clip_pixels([image, image]))


def test_images_of_a_list_may_differ_in_size_and_mode() -> None:
    images = [noise(90, 250), noise(40, 30).convert("L"), noise(300, 20).convert("RGBA")]
    assert torch.equal(clip_pixels(images), torch.cat([clip_pixels(image) for image in images]))
    apart = [to_vae_pixels(image, 16, 24) for image in images]
    assert torch.equal(to_vae_pixels(tuple(images), 16, 24), torch.cat(apart))
    assert torch.equal(apart[1], to_vae_pixels(images[1].convert("RGB"), 16, 24))


def test_a_tensor_of_bytes_is_the_image() -> None:
    image = noise(90, 250)
    tensor = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    assert torch.equal(clip_pixels(tensor), clip_pixels(image))
    assert torch.equal(to_vae_pixels(tensor, 90, 250), to_vae_pixels(image, 90, 250))


@pytest.mark.parametrize("size", [(30, 30), (37, 23), (12, 51)])
@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_fit_keeps_proportions_or_not(kind: str, size: tuple[int, int]) -> None:
    """Into a square.  Crop shows the middle; pad shows all, on black; stretch changes nothing."""
    image = noise(*size)
    pixels = np.asarray(image)
    given: Any = image if kind == "image" else torch.from_numpy(pixels).permute(2, 0, 1)

    def result(fit: Fit) -> np.ndarray:
        made = fitted(given, 64, 64, fit)
        if isinstance(made, torch.Tensor):
            return (made[0] * 255).round().byte().permute(1, 2, 0).numpy()
        return np.asarray(made[0])

    high, wide = pixels.shape[:2]
    side, longest = min(high, wide), max(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    np.testing.assert_array_equal(result("stretch"), pixels)
    np.testing.assert_array_equal(result("crop"), pixels[top : top + side, left : left + side])
    padded = result("pad")
    assert padded.shape == (longest, longest, 3)
    top, left = -((high - longest) // 2), -((wide - longest) // 2)
    np.testing.assert_array_equal(padded[top : top + high, left : left + wide], pixels)
    assert padded.sum(dtype=int) == pixels.sum(dtype=int)  # the rest is black


def test_padding_beyond_the_limit_of_pixels_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        fitted(Image.new("RGB", (60_000, 1)), 64, 64, "pad")
    complete(caught.value, "padded image", "60000 x 60000", "Shrink")
    with pytest.raises(SettingsError, match="fit: expected stretch, crop, pad, got 'cover'"):
        fitted(noise(8, 8), 64, 64, "cover")  # type: ignore[arg-type]


def test_a_picture_one_pixel_wide_works() -> None:
    line = Image.new("RGB", (1, 500), (10, 20, 30))
    normalised = (np.array([10, 20, 30]) / 255 - CLIP.image_mean) / CLIP.image_std
    expected = torch.tensor(normalised, dtype=torch.float32).view(1, 3, 1, 1)
    close(clip_pixels(line), expected.expand(1, 3, 224, 224))
    assert clip_pixels(line, 1).shape == (1, 3, 1, 1)
    assert to_vae_pixels(line, 16, 24).shape == (1, 3, 16, 24)


def test_half_precision_and_permuted_tensors_work() -> None:
    batch = torch.rand(2, 40, 50, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    assert torch.equal(clip_pixels(batch.half()), clip_pixels(batch.half().float().contiguous()))
    assert not to_vae_pixels(batch.requires_grad_(), 16, 24).requires_grad


# ---------------------------------------------------------------------------- wrong settings

EMPTY = Image.new("RGB", (0, 5))
RIGHT = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "got"),
    [
        ("photo.jpg", "str"),
        (None, "NoneType"),
        (np.zeros((8, 8, 3)), "ndarray"),
        ([], "an empty list"),
        ([RIGHT], "Tensor"),
        ([noise(8, 8), "photo.jpg"], "Image, str"),
        (EMPTY, "Image"),
        (torch.zeros(8, 8), "[8, 8]"),
        (torch.zeros(1, 4, 8, 8), "[1, 4, 8, 8]"),
        (torch.zeros(1, 1, 3, 8, 8), "[1, 1, 3, 8, 8]"),
        (torch.zeros(0, 3, 8, 8), "[0, 3, 8, 8]"),
        (torch.zeros(8, 8, 3), "[8, 8, 3]"),
        (torch.zeros(3, 8, 8, dtype=torch.int16), "torch.int16"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "torch.uint8 [8, 8, 3]"),
        (RIGHT - 0.5, "values from -0.5 to -0.5"),
        (RIGHT + 1.000001, "values from 1.00000095 to 1.00000095"),  # float32's nearest
        (RIGHT + 255, "values from 255 to 255"),
        (RIGHT * float("nan"), "nan"),
        (RIGHT + float("inf"), "inf"),
    ],
)
def test_wrong_images_are_refused_on_both_ways(images: object, got: str) -> None:
    with pytest.raises(SettingsError) as caught:
        to_vae_pixels(images, 16, 24)  # type: ignore[arg-type]
    complete(caught.value, "image", got)
    with pytest.raises(SettingsError) as caught:
        clip_pixels(images)
    complete(caught.value, "image", got)


@pytest.mark.parametrize("wrong", [0, -8, 2.5, "576"])
def test_wrong_sizes_are_refused(wrong: object) -> None:
    image = noise(8, 8)
    calls = [
        lambda: cover(image, wrong, 8),  # type: ignore[arg-type]
        lambda: cover(image, 8, wrong),  # type: ignore[arg-type]
        lambda: to_vae_pixels(image, wrong, 8),  # type: ignore[arg-type]
        lambda: clip_pixels(image, wrong),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(SettingsError) as caught:
            call()
        complete(caught.value, str(wrong), "pixels")


def test_cover_refuses_what_is_no_image() -> None:
    with pytest.raises(SettingsError) as caught:
        cover("photo.jpg", 8, 8)  # type: ignore[arg-type]
    complete(caught.value, "str", "load_image")


def test_a_given_image_of_unknown_range_is_refused() -> None:
    with pytest.raises(ImageError) as caught:
        to_vae_pixels(Image.new("F", (8, 8)), 16, 24)
    complete(caught.value, "mode F", "8 bits")
