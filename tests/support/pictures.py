"""Pictures to be read, and frames to be written."""

import numpy as np
from PIL import Image

from tests.support.paths import PHOTOGRAPH

FRAMES, HEIGHT, WIDTH = 10, 96, 160


def smooth_clip() -> np.ndarray:
    """A coloured gradient with a soft spot that moves across it.  [F, H, W, 3] uint8"""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / WIDTH
    spots = [np.exp(-(((x - f / FRAMES) ** 2 + (y - 0.3) ** 2) * 40)) for f in range(FRAMES)]
    clip = np.stack([np.stack([x, 0.7 * y + 0.3 * spot, 0.2 + 0.6 * spot], -1) for spot in spots])
    return (clip * 255).round().astype(np.uint8)


def photo_clip() -> np.ndarray:
    """A camera move over the photograph, from the saucer up to the cup.  [F, H, W, 3] uint8"""
    photo = np.asarray(Image.open(PHOTOGRAPH).convert("RGB"))
    return np.stack([photo[240 - 8 * f :, 240 + 3 * f :][:HEIGHT, :WIDTH] for f in range(FRAMES)])


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def noise_clip(height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)


CLIPS = {"smooth": smooth_clip(), "photo": photo_clip()}
