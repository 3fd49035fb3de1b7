"""Training images: free photographs, and collages of shapes cut from them and from procedural textures.

Knows licences, crops and colours; knows nothing of networks or motion.  Images are uint8 [H, W, 3], RGB.
Every draw takes a numpy generator, so that a step's images depend on the seed and the step alone.
"""

from __future__ import annotations

from importlib.resources import files
from math import log

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

cv2.setNumThreads(1)

Image = NDArray[np.uint8]

# What scikit-image 0.26 packages with a licence beyond doubt; its docstrings give the sources.
PHOTOGRAPHS = {
    "astronaut.png": "public domain, NASA (Great Images in NASA, Eileen Collins)",
    "hubble_deep_field.jpg": "public domain, NASA (HubbleSite 2012-37)",
    "retina.jpg": "CC0, Mikael Haggstrom (Wikimedia Commons, Fundus photograph of normal left eye)",
    "brick.png": "CC0 (CC0Textures, Bricks25)",
    "grass.png": "CC0, linolafett (DeviantArt, Grass 01)",
    "gravel.png": "CC0 (CC0Textures, Gravel04)",
    "cell.png": "CC0, Mueller et al. (qpformat)",
    "horse.png": "CC0, Andreas Preuss (openclipart 158377)",
    "text.png": "public domain (Wikipedia, Corner.png)",
}

FAVOURED = {"astronaut.png": 5.0, "retina.jpg": 1.5, "horse.png": 0.3, "text.png": 0.3, "cell.png": 0.5}


def photographs() -> dict[str, Image]:
    folder = files("skimage") / "data"
    return {name: _read(str(folder / name)) for name in PHOTOGRAPHS}


def _read(path: str) -> Image:
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(path)
    return np.ascontiguousarray(image[..., ::-1])


class Source:
    """Photographs and `collages` of them, from which `crop` cuts training images."""

    def __init__(self, seed: int, collages: int = 300, size: int = 320) -> None:
        images = photographs()
        self._photographs = list(images.values())
        weights = np.array([FAVOURED.get(name, 1.0) for name in images])
        self._weights = weights / weights.sum()
        self._collages: list[Image] = []
        made = [self._collage(np.random.default_rng([seed, 1, i]), size) for i in range(collages)]
        self._collages = made

    def crop(self, rng: Generator, height: int, width: int, collage: float = 0.5) -> Image:
        """A random part of a random image, scaled to `height` x `width` and recoloured."""
        if self._collages and rng.random() < collage:
            image = self._collages[rng.integers(len(self._collages))]
        else:
            image = self._photographs[rng.choice(len(self._photographs), p=self._weights)]
        if rng.random() < 0.5:
            image = image[:, ::-1]
        if rng.random() < 0.3:
            image = image.transpose(1, 0, 2)
        if rng.random() < 0.2:
            image = image[::-1]
        largest = min(image.shape[0] / height, image.shape[1] / width)
        scale = np.exp(rng.uniform(log(0.8), log(max(largest, 0.81))))  # source pixels per pixel
        h, w = (
            min(round(side * scale), limit) for side, limit in zip((height, width), image.shape, strict=False)
        )
        top, left = rng.integers(image.shape[0] - h + 1), rng.integers(image.shape[1] - w + 1)
        part = np.ascontiguousarray(image[top : top + h, left : left + w])
        part = cv2.resize(
            part, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC
        )
        return recolour(rng, part)

    def _collage(self, rng: Generator, size: int) -> Image:
        """Dead leaves: overlapping discs, boxes and polygons, each filled by a texture of its own."""
        canvas = self._texture(rng, size)
        for _ in range(rng.integers(8, 70)):
            radius = int(np.clip(size * 0.03 / rng.random() ** 0.7, 5, size * 0.4))
            mask = shape_mask(rng, radius)
            leaf = self._texture(rng, 2 * radius)
            x, y = rng.integers(-radius, size - radius, 2)
            paste(canvas, leaf, mask, int(x), int(y))
        if rng.random() < 0.3:
            canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.5, 2))
        return canvas

    def plain(self, rng: Generator, height: int, width: int) -> Image:
        """A few leaves before a wall or a sky: on plain areas a clip's noise is seen first."""
        size = max(height, width)
        flat = np.broadcast_to(colour(rng), (size, size, 3)).astype(np.uint8)
        ramp, share = gradient(rng, size), rng.random()
        canvas = cv2.addWeighted(ramp, share, flat, 1 - share, 0)
        for _ in range(rng.integers(5)):
            radius = int(rng.integers(size // 16, size // 3))
            leaf, mask = self._texture(rng, 2 * radius), shape_mask(rng, radius)
            x, y = rng.integers(-radius, size - radius, 2)
            paste(canvas, leaf, mask, int(x), int(y))
        return np.ascontiguousarray(canvas[:height, :width])

    def _texture(self, rng: Generator, size: int) -> Image:
        kind = rng.random()
        if kind < 0.35:
            return self.crop(rng, size, size, collage=0)
        if kind < 0.55:
            return noise(rng, size)
        if kind < 0.75:
            return gradient(rng, size)
        if kind < 0.85:
            return stripes(rng, size)
        return np.broadcast_to(colour(rng), (size, size, 3)).astype(np.uint8).copy()


def shape_mask(rng: Generator, radius: int) -> NDArray[np.float32]:
    """[2 radius, 2 radius] in [0, 1]: an ellipse, a box, or a polygon, with soft edges."""
    mask = np.zeros((2 * radius, 2 * radius), np.uint8)
    centre = (radius, radius)
    kind, angle = rng.random(), float(rng.uniform(0, 360))
    axes = (radius - 1, max(2, int((radius - 1) * rng.uniform(0.3, 1))))
    if kind < 0.4:
        cv2.ellipse(mask, centre, axes, angle, 0, 360, 255, -1, cv2.LINE_AA)
    elif kind < 0.65:
        box = cv2.boxPoints((centre, (axes[0] * 1.4, axes[1] * 1.4), angle))
        cv2.fillPoly(mask, [box.astype(np.int32)], 255, cv2.LINE_AA)
    else:
        corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        reach = (radius - 1) * rng.uniform(0.5, 1, len(corners))
        points = np.stack([np.cos(corners) * reach, np.sin(corners) * reach], 1) + radius
        cv2.fillPoly(mask, [points.astype(np.int32)], 255, cv2.LINE_AA)
    return (mask / np.float32(255)).astype(np.float32)


def paste(canvas: Image, leaf: Image, mask: NDArray[np.float32], x: int, y: int) -> None:
    """Blends `leaf` into `canvas` with its top left corner at (x, y); what lies outside is cut."""
    h, w = canvas.shape[:2]
    top, left = max(y, 0), max(x, 0)
    bottom, right = min(y + leaf.shape[0], h), min(x + leaf.shape[1], w)
    if bottom <= top or right <= left:
        return
    rows, columns = slice(top - y, bottom - y), slice(left - x, right - x)
    alpha = mask[rows, columns, None]
    under = canvas[top:bottom, left:right]
    canvas[top:bottom, left:right] = (under * (1 - alpha) + leaf[rows, columns] * alpha).astype(np.uint8)


def colour(rng: Generator) -> NDArray[np.float64]:
    """More greys and dull colours than saturated ones, as in photographs."""
    return np.clip(rng.uniform(0, 255) + rng.normal(0, rng.choice([5, 25, 60]), 3), 0, 255)


def gradient(rng: Generator, size: int) -> Image:
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    t = (
        np.cos(angle) * x + np.sin(angle) * y
        if rng.random() < 0.6
        else np.hypot(x - rng.uniform(-0.5, 0.5), y)
    )
    t = (np.clip(t + 0.5, 0, 1) ** rng.uniform(0.5, 2))[..., None]
    return (colour(rng) * (1 - t) + colour(rng) * t).astype(np.uint8)


def noise(rng: Generator, size: int) -> Image:
    """Noise with a spectrum of 1/f^a, as natural images have."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1 / size
    spectrum = np.fft.rfft2(rng.standard_normal((2, size, size))) / f ** rng.uniform(0.7, 2.2)
    a, b = np.fft.irfft2(spectrum, (size, size))
    a, b = a / a.std(), b / b.std()
    values = colour(rng) + a[..., None] * rng.normal(0, 1, 3) * 15 + (a * rng.uniform(5, 45))[..., None]
    return np.clip(values + b[..., None] * rng.normal(0, 1, 3) * 12, 0, 255).astype(np.uint8)


def stripes(rng: Generator, size: int) -> Image:
    y, x = np.mgrid[0:size, 0:size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(6, 50)
    wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period) * rng.uniform(1, 4)
    t = (np.clip(wave, -1, 1) / 2 + 0.5)[..., None]
    return (colour(rng) * (1 - t) + colour(rng) * t).astype(np.uint8)


def recolour(rng: Generator, image: Image) -> Image:
    """Contrast, brightness, gamma and hue; grey images, and a third of the others, get a tint."""
    if rng.random() < 0.15:
        return image
    values = image.astype(np.float32) / 255
    grey = values.mean(2, keepdims=True)
    if rng.random() < 0.2:
        values = values[..., rng.permutation(3)]
    values = grey + (values - grey) * np.float32(rng.uniform(0.4, 1.5))  # saturation
    values = np.clip(values, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.25)))
    values = values * rng.normal(1, 0.12, 3).astype(np.float32) + rng.normal(0, 0.06, 3).astype(np.float32)
    middle = np.float32(values.mean())
    values = middle + (values - middle) * np.float32(np.exp(rng.normal(0, 0.25)))
    return (np.clip(values + np.float32(rng.normal(0, 0.06)), 0, 1) * 255).astype(np.uint8)
