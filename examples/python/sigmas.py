"""Denoise along noise levels of your own, in place of the checkpoint's schedule.

    python sigmas.py bundles/svd-xt photo.jpg video.mp4

The levels here are those of Karras et al. 2022, equation 5, with fewer steps at low noise (rho 5, not 7).
"""

import sys

import torch

from svd_engine import VideoEngine, load_image


def levels(steps: int, largest: float = 700.0, smallest: float = 0.002, rho: float = 5.0) -> list[float]:
    """Noise levels that fall from `largest` to `smallest`, and a last 0.0: one more than there are steps."""
    ramp = torch.linspace(largest ** (1 / rho), smallest ** (1 / rho), steps, dtype=torch.float64)
    return [*(ramp**rho).tolist(), 0.0]


def main(bundle: str, photograph: str, video: str) -> None:
    with VideoEngine.from_bundle(bundle) as engine:
        result = engine(
            load_image(photograph), fit="crop", sigmas=levels(steps=15), generator=torch.manual_seed(42)
        )
    result.save(video)


if __name__ == "__main__":
    main(*sys.argv[1:])
