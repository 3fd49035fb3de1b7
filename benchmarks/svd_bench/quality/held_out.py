"""Photographs that the demo checkpoint never saw: what every claim about its quality is measured on."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from PIL.Image import Image

from svd_engine.errors import BackendUnavailable
from svd_engine.install import install_line
from svd_engine.media.image import cover, load_image

# name: package that brings it, place in it, licence
HELD_OUT = {
    "coffee": ("skimage", "data/coffee.png", "CC0, Rachel Michetti"),
    "chelsea": ("skimage", "data/chelsea.png", "CC0, Stefan van der Walt"),
    "camera": ("skimage", "data/camera.png", "CC0, Lav Varshney"),
    "clock": ("skimage", "data/clock_motion.png", "public domain, Stefan van der Walt"),
    "hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "public domain, U.S. Navy"),
}


def held_out(height: int, width: int) -> dict[str, Image]:
    """Each photograph's centre at the aspect ratio height : width, RGB, not yet resized.

    Raises BackendUnavailable where a package is missing.
    """
    return {name: cover(load_image(_path(*place[:2])), height, width) for name, place in HELD_OUT.items()}


def _path(package: str, place: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise BackendUnavailable(
            "held-out photographs",
            expected=f"the package {package}, which brings them",
            got="not installed",
            remedy=f"Run: {install_line('bench')}",
        )
    return Path(spec.origin).parent / place
