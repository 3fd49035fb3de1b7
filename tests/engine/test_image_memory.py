"""A picture takes a small multiple of its pixels, whatever its file holds."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine.media import image
from tests.support.pictures import noise

SIDE = 4000  # pixels
BYTES = 24  # per pixel, beyond what one band takes
BAND_BYTES = 200  # per pixel of a band

MEASURE = """
import json, sys, threading
import psutil, torch
from PIL import Image
from svd_engine.media import image
def run(picture):
    image.to_clip_pixels(image.cover(picture, 576, 1024), 224, [0.5] * 3, [0.5] * 3)
    image.to_vae_pixels(image.cover(picture, 576, 1024), 576, 1024)
run(Image.new("RGB", (640, 480)))
me, peak, done = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, me.memory_info().rss)
before = me.memory_info().rss
watcher = threading.Thread(target=watch)
watcher.start()
picture = image.load_image(sys.argv[1])
run(picture)
done.set()
watcher.join()
print(json.dumps(peak - before))
"""


def png(side: int, bits: int, colour: int, channels: int) -> bytes:
    """A square PNG that says little in many pixels: each row is the same, and compresses to nothing."""
    row = b"\0" + bytes(range(1, 1 + channels * bits // 8)) * side
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, 0)),
        (b"IDAT", body),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("bits", "colour", "channels"),
    [(16, 6, 4), (16, 0, 1), (8, 2, 3)],
    ids=["16-bit RGBA", "16-bit grey", "8-bit RGB"],
)
def test_memory_is_a_small_multiple_of_the_pixels(
    tmp_path: Path, bits: int, colour: int, channels: int
) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(png(SIDE, bits, colour, channels))
    assert file.stat().st_size < 2**20
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) < BYTES * SIDE**2 + BAND_BYTES * image.BAND


MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"]


@pytest.mark.parametrize("mode", MODES)
def test_bands_change_no_byte(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = noise(37, 23).convert(mode)
    if mode == "P":
        picture.info["transparency"] = 3
    whole = image.to_vae_pixels(picture, 16, 24)
    clip = image.to_clip_pixels(picture, 16, [0.5] * 3, [0.5] * 3)
    monkeypatch.setattr(image, "BAND", 100)
    assert torch.equal(image.to_vae_pixels(picture, 16, 24), whole)
    assert (image.to_clip_pixels(picture, 16, [0.5] * 3, [0.5] * 3) - clip).abs().max() <= 1e-6


def test_bands_of_16_bit_grey_and_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = Image.fromarray(np.arange(37 * 23, dtype=np.uint16).reshape(37, 23) * 77)
    tensor = torch.rand(2, 3, 37, 23, generator=torch.Generator().manual_seed(0))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG")
    whole = image.decode_image(buffer.getvalue())
    clip = image.to_clip_pixels(tensor, 16, [0.5] * 3, [0.5] * 3)
    monkeypatch.setattr(image, "BAND", 100)
    assert np.array_equal(image.decode_image(buffer.getvalue()), whole)
    assert (image.to_clip_pixels(tensor, 16, [0.5] * 3, [0.5] * 3) - clip).abs().max() <= 1e-6
