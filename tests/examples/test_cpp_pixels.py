"""Pixels and draws of the C++ example against Pillow, torch and our own images.  Under sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin

from svd_engine.media.image import fitted, load_image, to_clip_pixels, to_vae_pixels
from svd_engine.values import Fit
from tests.examples.conftest import SANITIZERS, Programs
from tests.support.paths import PHOTOGRAPH

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ORIENTATION = 0x112


def run(programs: Programs, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(programs.checks), *map(str, words)]
    environment = {**os.environ, **SANITIZERS}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def as_pillow_13(framed: Any, height: int, width: int) -> Any:
    """Resized in rows already where Pillow 13 would do these first, and older ones do not."""

    def begun(image: Image.Image) -> Image.Image:
        rows_first = image.height - height > max(0, 2 * (image.width - width))
        if int(PIL.__version__.partition(".")[0]) >= 13 or not rows_first:
            return image
        return image.resize((image.width, height), Image.Resampling.LANCZOS)

    return [begun(image) for image in (framed if isinstance(framed, (list, tuple)) else [framed])]


def check(programs: Programs, picture: Path, height: int, width: int, size: int, fit: Fit = "crop") -> None:
    out = picture.with_suffix(".out")
    done = run(programs, picture, height, width, size, out, fit)
    assert done.returncode == 0, done.stderr
    wanted = load_image(picture)
    rgb = np.fromfile(f"{out}.rgb", np.uint8).reshape(wanted.height, wanted.width, 3)
    np.testing.assert_array_equal(rgb, np.asarray(wanted))
    framed = fitted(wanted, height, width, fit)
    vae = np.fromfile(f"{out}.vae", np.float32).reshape(1, 3, height, width)
    np.testing.assert_array_equal(
        vae, to_vae_pixels(as_pillow_13(framed, height, width), height, width).numpy()
    )
    clip = np.fromfile(f"{out}.clip", np.float32).reshape(1, 3, size, size)
    assert np.abs(clip - to_clip_pixels(framed, size, MEAN, STD).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(32, 48, 32), (512, 640, 224), (576, 1024, 224), (40, 8, 20), (8, 96, 33), (96, 600, 1), (64, 64, 500)],
)
def test_the_photograph_at_every_size(
    programs: Programs, tmp_path: Path, height: int, width: int, size: int
) -> None:
    """Down, up and both; wide, square, and tall, where Pillow resizes rows first; the picture's own width."""
    picture = tmp_path / "photo.jpg"
    picture.write_bytes(PHOTOGRAPH.read_bytes())
    check(programs, picture, height, width, size)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize(("height", "width"), [(32, 48), (96, 40)])
def test_every_fit(programs: Programs, tmp_path: Path, fit: Fit, height: int, width: int) -> None:
    picture = tmp_path / "photo.png"
    noise("RGB").save(picture)  # 37 x 23: padding is odd
    check(programs, picture, height, width, 32, fit)


def noise(mode: str, width: int = 37, height: int = 23) -> Image.Image:
    bytes_ = np.random.default_rng(3).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(bytes_, "RGBA").convert(mode)


def grey16(path: Path) -> None:
    values = np.random.default_rng(4).integers(0, 65536, (23, 37), dtype=np.uint16)
    Image.fromarray(values).save(path)


def transparent_palette(path: Path) -> None:
    noise("RGB").quantize(16).save(path, transparency=bytes(range(0, 256, 16)))


def colour_key(path: Path) -> None:
    image = noise("RGB")
    image.save(path, transparency=image.getpixel((5, 5)))


def exif_png(path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise("RGB").save(path, exif=exif)


def profile_ignored(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", (20000).to_bytes(4, "big"))  # a gamma of 5
    noise("RGB").save(path, pnginfo=info)


WRITERS: dict[str, Callable[[Path], None]] = {
    **{f"{m}.png": lambda path, m=m: noise(m).save(path) for m in ("1", "L", "LA", "RGB", "RGBA")},
    "16-bit grey.png": grey16,
    "palette.png": lambda path: noise("RGB").quantize(16).save(path),
    "four colours.png": lambda path: noise("RGB").quantize(4).save(path, bits=2),
    "transparent palette.png": transparent_palette,
    "colour key.png": colour_key,
    "orientation.png": exif_png,
    "gamma.png": profile_ignored,
    "one pixel.png": lambda path: noise("RGB", 1, 1).save(path),
    "grey.jpg": lambda path: noise("L").save(path),
    "4:4:4.jpg": lambda path: noise("RGB").save(path, subsampling=0, quality=95),
    "4:2:0.jpg": lambda path: noise("RGB").save(path, subsampling=2, quality=30),
    "progressive.jpg": lambda path: noise("RGB").save(path, progressive=True),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file(programs: Programs, tmp_path: Path, name: str) -> None:
    picture = tmp_path / name.replace(":", "")
    WRITERS[name](picture)
    check(programs, picture, 16, 24, 16)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_every_orientation(programs: Programs, tmp_path: Path, orientation: int) -> None:
    """9 is none: such a picture stays as it is."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise("RGB").save(tmp_path / "turned.jpg", exif=exif)
    check(programs, tmp_path / "turned.jpg", 16, 24, 16)


def jpeg(**options: object) -> bytes:
    import io

    file = io.BytesIO()
    noise(str(options.pop("mode", "RGB"))).save(file, "JPEG", **options)
    return file.getvalue()


def png() -> bytes:
    import io

    file = io.BytesIO()
    noise("RGB").save(file, "PNG")
    return file.getvalue()


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG that promises a size, with a right checksum."""
    import zlib

    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0d" + chunk + zlib.crc32(chunk).to_bytes(4, "big")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


EMPTY_IDAT = b"\x00\x00\x00\x00IDAT\x35\xaf\x06\x1e"
BAD_FILES = {
    "empty": (b"", "an empty file"),
    "a text": (b"hello, this is not a picture", "another format"),
    "a PNG cut off": (png()[:-40], "the file ends early"),
    "a PNG altered": (flipped(png(), 200), "IDAT: incorrect data check"),
    "a PNG too large": (header(60_000, 60_000) + EMPTY_IDAT, "60000 x 60000"),
    "a JPEG cut off": (jpeg()[:-100], "Premature end of JPEG file"),
    "a JPEG of nothing": (b"\xff\xd8\xff\xd9", "expected a whole picture"),
    "CMYK": (jpeg(mode="CMYK"), "expected a whole picture, PNG or JPEG (RGB or grey)"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_pictures_are_refused(programs: Programs, tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / "bad").write_bytes(content)
    done = run(programs, tmp_path / "bad", 16, 24, 16, tmp_path / "out", "crop")
    assert done.returncode == 1
    assert f"error: image {tmp_path}/bad: expected " in done.stderr
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_damaged_exif_is_no_orientation(programs: Programs, tmp_path: Path) -> None:
    """Directories that lie outside the segment, and counts that no file can hold."""
    for index, tiff in enumerate((b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01\x12", b"II*", b"")):
        exif = b"Exif\0\0" + tiff
        segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
        picture = tmp_path / f"{index}.jpg"
        picture.write_bytes(jpeg()[:2] + segment + jpeg()[2:])
        done = run(programs, picture, 16, 24, 16, tmp_path / "out", "crop")
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**40 + 7, 2**64 - 1])
@pytest.mark.parametrize("counts", [(16, 16), (4608, 4608), (17, 31), (3 * 24 * 24, 1600)])
def test_draws_are_torch_draws(
    programs: Programs, tmp_path: Path, seed: int, counts: tuple[int, int]
) -> None:
    out = tmp_path / "randn"
    done = run(programs, "randn", seed, *counts, out)
    assert done.returncode == 0, done.stderr
    generator = torch.Generator("cpu").manual_seed(seed)
    wanted = torch.cat([torch.randn(count, generator=generator) for count in counts]).numpy()
    assert np.abs(np.fromfile(f"{out}.draws", np.float32) - wanted).max() < 2e-6
