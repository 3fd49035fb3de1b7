"""svd_engine.image against Pillow and diffusers: what it reads, what it refuses, what the networks get."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as reference
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import CLIPImageProcessor

from svd_engine.errors import ImageError, SettingsError, SvdEngineError
from svd_engine.image import MAX_PIXELS, MAX_SIDE, cover, load_image, to_clip_pixels, to_vae_pixels
from tests.paths import PHOTOGRAPH

CLIP = CLIPImageProcessor()
TOLERANCE = 1e-6


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def complete(error: SvdEngineError, *parts: str) -> None:
    """The message names everything that a user needs, and in particular `parts`."""
    assert error.what
    assert error.expected
    assert error.got
    assert error.remedy.endswith(".")
    for part in (error.what, error.expected, error.got, error.remedy, *parts):
        assert part in str(error)


# ---------------------------------------------------------------------------- the photograph


def test_the_photograph_is_the_one_that_its_readme_describes() -> None:
    data = PHOTOGRAPH.read_bytes()
    readme = PHOTOGRAPH.with_name("README.md").read_text()
    assert hashlib.sha256(data).hexdigest() in readme
    assert f"{len(data):,} bytes" in readme
    photo = load_image(PHOTOGRAPH)
    assert (photo.size, photo.mode) == ((600, 400), "RGB")


def test_importing_image_and_video_costs_no_torch_and_no_av() -> None:
    heavy = "{'torch', 'av', 'diffusers', 'transformers', 'onnxruntime'}"
    code = f"import sys, svd_engine.image, svd_engine.video; print({heavy} & set(sys.modules) or 'light')"
    env = {**os.environ, "PYTHONPATH": str(PHOTOGRAPH.parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "light"


# ---------------------------------------------------------------------------- files that are read


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((f"a.{suffix}", mode) for suffix in ("png", "tiff") for mode in ("RGB", "L", "1", "P")),
        *(("a.tiff", "CMYK"), ("a.jpg", "CMYK"), ("a.jpg", "RGB"), ("a.jpg", "L"), ("a.webp", "RGB")),
        *(("a.gif", "P"), ("a.bmp", "RGB"), ("a.ppm", "RGB")),
    ],
)
def test_any_format_and_mode_becomes_what_pillow_converts_it_to(tmp_path: Path, name: str, mode: str) -> None:
    noise(20, 30).convert(mode).save(tmp_path / name)
    image = load_image(tmp_path / name)
    assert (image.size, image.mode) == ((30, 20), "RGB")
    with Image.open(tmp_path / name) as stored:
        assert np.array_equal(image, stored.convert("RGB"))


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff", "grey.pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    eight = np.arange(256, dtype=np.uint16).reshape(16, 16)
    wide = eight * 257 + np.where(eight % 2, 128, 0) * (eight < 255)  # odd ones a little under the next step
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 16 16 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide.astype(np.uint16)).save(tmp_path / name)
    read = np.asarray(load_image(tmp_path / name))
    assert read.shape == (16, 16, 3)
    assert np.array_equal(read[..., 0], eight)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :] = [(200, 0, 100, 0), (200, 0, 100, 255), (200, 0, 100, 128)]
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    read = np.asarray(load_image(tmp_path / "rgba.png"))[0].astype(int)
    assert read[:2].tolist() == [[255, 255, 255], [200, 0, 100]]
    assert np.abs(read[2] - (0.5 * np.array([200, 0, 100]) + 127.5)).max() <= 1

    Image.fromarray(rgba[..., [0, 3]], mode="LA").save(tmp_path / "la.png")
    assert np.asarray(load_image(tmp_path / "la.png"))[0, :2, 0].tolist() == [255, 200]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=b"\x00\xff")
    assert np.asarray(load_image(tmp_path / "p.png"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


UPRIGHT = {  # EXIF orientation: what has to be done to the stored pixels (EXIF 2.3, table 4.6.4)
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = noise(5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "turned.png"), UPRIGHT[orientation](np.asarray(stored)))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animation_the_first_frame_is_read(tmp_path: Path, suffix: str) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if suffix == ".webp" else {}
    red.save(tmp_path / f"a{suffix}", save_all=True, append_images=[blue], duration=100, **options)
    assert np.array_equal(load_image(tmp_path / f"a{suffix}"), red)


# ---------------------------------------------------------------------------- files that are refused


def png_header(width: int, height: int) -> bytes:
    """A valid PNG header that declares a size, and no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"x\x9c")]
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (None, "nothing at that path"),
        ("folder", "a folder or a device"),
        ("pipe", "a folder or a device"),
        (b"", "an empty file"),
        (b"this is not a picture", "UnidentifiedImageError"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "UnidentifiedImageError"),
        (png_header(0, 100), "UnidentifiedImageError"),
        (png_header(100, 100), "OSError"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes | str | None, got: str) -> None:
    path = tmp_path / "given"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    complete(caught.value, str(path), got)


@pytest.mark.filterwarnings("error")  # Pillow's own warning of large images must not be seen either
@pytest.mark.parametrize(
    ("width", "height", "got"),
    [
        (8001, 8000, "8001 x 8000"),
        (10_000, 10_000, "10000 x 10000"),  # Pillow only warns
        (100_000, 100_000, "more than Pillow opens"),
        (MAX_SIDE + 1, 1, "65536 x 1"),
    ],
)
def test_a_picture_too_large_is_refused_by_its_header(
    tmp_path: Path, width: int, height: int, got: str
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "bomb.png")
    complete(caught.value, "bomb.png", f"{MAX_PIXELS:,}", got)


def test_32_bit_values_of_unknown_range_are_refused(tmp_path: Path) -> None:
    for values in (np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32)):
        Image.fromarray(values).save(tmp_path / "wide.tiff")
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / "wide.tiff")
        complete(caught.value, "wide.tiff", "unknown range", "8 bits")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_a_damaged_file_is_read_or_refused_but_never_crashes(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    noise(24, 32).save(buffer, name)
    whole, path, draw = buffer.getvalue(), tmp_path / "damaged", random.Random(0)
    damaged = [whole[: len(whole) * part // 10] for part in range(1, 10)]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(4):
            changed[draw.randrange(min(len(whole), 400))] = draw.randrange(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert load_image(path).mode == "RGB"
        except ImageError as error:
            refused += 1
            complete(error, "damaged")
    assert refused >= 9  # every truncated one


# ---------------------------------------------------------------------------- cover


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (1024, 576), (100, 1), (1, 100), (333, 334)])
@pytest.mark.parametrize(("height", "width"), [(576, 1024), (1024, 576), (64, 64)])
def test_cover_crops_the_centre_to_the_aspect_ratio(size: tuple[int, int], height: int, width: int) -> None:
    across, down = size
    x, y = np.meshgrid(np.arange(across), np.arange(down))
    image = Image.fromarray(np.stack([x // 256, x % 256, y // 256 * 16 + y % 256 % 16], -1).astype(np.uint8))
    cropped = cover(image, height, width)
    assert cropped.width == across or cropped.height == down  # nothing more than needed
    if min(size) > 1:
        assert abs(cropped.width - cropped.height * width / height) <= 1
    left, top = (across - cropped.width) // 2, (down - cropped.height) // 2
    assert np.array_equal(cropped, np.asarray(image)[top : top + cropped.height, left : left + cropped.width])


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
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (RIGHT - 0.1, "values from -0.1 to -0.1"),
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
