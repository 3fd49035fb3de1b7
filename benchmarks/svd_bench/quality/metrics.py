"""How alike two videos are, and how one holds together.  Frames are [F, H, W, 3] in [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svd_engine.media.motion import optical_flow

Frames = NDArray[np.float32]


def ssim(a: Frames, b: Frames) -> float:
    """Mean over frames of the structural similarity of Wang et al. 2004."""
    from skimage.metrics import structural_similarity

    options: dict[str, Any] = {
        "channel_axis": 2,
        "data_range": 1.0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    return float(np.mean([structural_similarity(x, y, **options) for x, y in zip(a, b, strict=True)]))


def flow_difference(a: Frames, b: Frames) -> float:
    """Mean distance between the two videos' flow vectors, in pixels a frame."""
    return float(np.linalg.norm(optical_flow(a) - optical_flow(b), axis=3).mean())


def warp_error(frames: Frames) -> float:
    """Root mean square of what motion does not explain: each frame against the next one moved back to it.

    Pixels whose source lies outside the picture do not count.
    """
    import cv2

    flow = optical_flow(frames)
    height, width = frames.shape[1:3]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    errors = []
    for now, after, move in zip(frames[:-1], frames[1:], flow, strict=True):
        there_x, there_y = x + move[..., 0], y + move[..., 1]
        inside = (there_x >= 0) & (there_x <= width - 1) & (there_y >= 0) & (there_y <= height - 1)
        back = cv2.remap(after, there_x, there_y, cv2.INTER_LINEAR)
        errors.append(((now - back) ** 2)[inside].mean())
    return float(np.sqrt(np.mean(errors)))


def contrast_kept(frames: Frames) -> float:
    """Standard deviation of the last frame over that of the first."""
    return float(frames[-1].std() / frames[0].std())
