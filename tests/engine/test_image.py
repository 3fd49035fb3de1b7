"""Photographs as users have them: read, cropped, or refused with a reason."""

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

import numpy as np
import pytest
from PIL import Image

from svd_engine.errors import ImageError
from svd_engine.media.image import MAX_PIXELS, MAX_SIDE, cover, load_image
from tests.support.messages import complete
from tests.support.paths import PHOTOGRAPH
from tests.support.pictures import noise

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
    modules = "svd_engine.media.image, svd_engine.media.video"
    code = f"import sys, {modules}; print({heavy} & set(sys.modules) or 'light')"
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
