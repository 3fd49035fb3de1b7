"""Clips of known motion, made of latents: zooms, pans, turns, and objects that move, over encoded canvases.

The autoencoder learnt that a latent moved is an image moved.  The mean speed follows the conditioning: SPEED
pixels a frame at motion bucket 127 and 7 frames a second, proportional to the root of the bucket and to the
time between frames: a quarter of the bucket halves the speed.  The camera moves in, to either side, or turns;
objects go anywhere.  The first frame lies on whole latent pixels: it is what an encoder gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import configs
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

SPEED = 1.0  # pixels a frame
KINDS = {"pan": 0.9, "zoom": 0.04, "turn": 0.03, "object": 0.03}
RIGHT = 0.95  # share of the camera's ways that go to the right


@dataclass(frozen=True)
class LatentClip:
    video: Tensor  # [F, 4, h, w]
    first: Tensor  # [4, h, w] of the image with noise
    fps: int
    motion_bucket: int


def speed_of(motion_bucket: int, fps: int) -> float:
    """Pixels a frame."""
    return SPEED * math.sqrt(motion_bucket / 127) * 7 / fps


def draw_clip(data: dict[str, Tensor], row: int, rng: Generator, window: tuple[int, int]) -> LatentClip:
    """A clip of `window` latent pixels of the canvas `row` of `canvases.load`."""
    motion_bucket, fps = int(rng.integers(5, 256)), int(rng.integers(5, 13))
    speed = speed_of(motion_bucket, fps) / configs.VAE_SCALE  # latent pixels a frame
    kind = rng.choice(list(KINDS), p=list(KINDS.values()))
    canvas = data["clean"][row]
    h, w = window
    y, x = np.mgrid[0:h, 0:w] - np.array([h - 1, w - 1])[:, None, None] / 2
    rate, sign = speed / np.hypot(y, x).mean(), 1 if rng.random() < RIGHT else -1
    pan = sign * {"pan": speed, "object": 0.3 * speed}.get(kind, 0.0)
    travel = math.ceil(abs(pan) * (configs.FRAMES - 1))  # what the camera passes over lies on the canvas
    top = int(rng.integers(canvas.shape[1] - h + 1))
    left = int(rng.integers(canvas.shape[2] - w - travel + 1)) + travel * (sign < 0)
    t = np.arange(configs.FRAMES)[:, None, None]
    zoom, turn = np.exp(-rate * t * (kind == "zoom")), sign * rate * t * (kind == "turn")
    at_x = zoom * (np.cos(turn) * x - np.sin(turn) * y) + pan * t + left + (w - 1) / 2
    at_y = zoom * (np.sin(turn) * x + np.cos(turn) * y) + top + (h - 1) / 2
    video = sample(canvas, at_x, at_y)
    first = data["noisy"][row, :, top : top + h, left : left + w]
    if kind == "object":
        video, first = with_object(data, rng, video, first, 1.5 * speed)
    return LatentClip(video, first, fps, motion_bucket)


def sample(canvas: Tensor, x: np.ndarray, y: np.ndarray) -> Tensor:
    """[C, H, W] read at positions [F, h, w] in its pixels -> [F, C, h, w]."""
    height, width = canvas.shape[1:]
    grid = np.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], 3)
    grid = torch.from_numpy(grid).float()
    many = canvas.expand(len(grid), -1, -1, -1)
    return F.grid_sample(many, grid, mode="bicubic", padding_mode="border", align_corners=False)


def with_object(
    data: dict[str, Tensor], rng: Generator, video: Tensor, first: Tensor, speed: float
) -> tuple[Tensor, Tensor]:
    """A disc of another canvas moves over the clip, and lies on its first image."""
    h, w = video.shape[2:]
    other = int(rng.integers(len(data["clean"])))
    radius, angle = rng.uniform(1.5, h / 3), rng.uniform(0, 2 * np.pi)
    t = np.arange(len(video))[:, None, None]
    moved_x, moved_y = speed * np.cos(angle) * t, speed * np.sin(angle) * t
    y, x = np.mgrid[0:h, 0:w].astype(float)
    distance = np.hypot(x - moved_x - rng.uniform(0, w), y - moved_y - rng.uniform(0, h))
    mask = torch.from_numpy(np.clip(radius - distance + 0.5, 0, 1)).float()[:, None]
    canvas = data["clean"][other]
    top, left = (int(rng.integers(side - s + 1)) for side, s in zip(canvas.shape[1:], (h, w), strict=True))
    over = sample(canvas, x - moved_x + left, y - moved_y + top)
    noisy = data["noisy"][other, :, top : top + h, left : left + w]
    return torch.lerp(video, over, mask), torch.lerp(first, noisy, mask[0])
