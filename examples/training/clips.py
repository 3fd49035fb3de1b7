"""Clips of known motion, of pixels: what the decoder's temporal blocks learn from."""

from __future__ import annotations

from math import ceil

import cv2
import numpy as np
from images import Image, Source
from latent_clips import speed_of
from numpy.random import Generator
from numpy.typing import NDArray


def draw_clip(source: Source, rng: Generator, frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """[F, H, W, 3]: the camera passes over an image, comes nearer, or turns, at a constant speed."""
    speed = speed_of(int(rng.integers(5, 256)), int(rng.integers(5, 13)))
    margin = ceil(speed * frames) + 4
    canvas = source.crop(rng, height + 2 * margin, width + 2 * margin)
    direction = rng.uniform(0, 2 * np.pi)
    pan = speed * np.array([np.cos(direction), np.sin(direction)])
    zoom, turn = rng.normal(0, 0.01, 2)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    views = [view(canvas, height, width, zoom * t, turn * t, pan * t) for t in range(frames)]
    return np.stack(
        [
            cv2.warpAffine(canvas, m, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT_101)
            for m in views
        ]
    )


def view(
    canvas: Image, height: int, width: int, log_zoom: float, angle: float, shift: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[2, 3]: a frame's pixel -> the canvas's, about their centres."""
    c, s = np.cos(angle) * np.exp(log_zoom), np.sin(angle) * np.exp(log_zoom)
    linear = np.array([[c, -s], [s, c]])
    frame = np.array([width - 1, height - 1]) / 2
    middle = np.array([canvas.shape[1] - 1, canvas.shape[0] - 1]) / 2
    return np.hstack([linear, (middle + shift - linear @ frame)[:, None]])
