"""How alike two videos are, and how a video moves.  Frames are [F, H, W, 3] in [0, 1]; flow in pixels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.float32]
Flow = NDArray[np.float32]  # [F - 1, H, W, 2]: where each pixel of a frame is in the next


def psnr(a: Frames, b: Frames) -> float:
    """Decibels; infinite for equal frames."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


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


def optical_flow(frames: Frames) -> Flow:
    """DIS optical flow (Kroeger et al. 2016) between neighbouring frames."""
    import cv2

    grey = [cv2.cvtColor((f * 255).round().astype(np.uint8), cv2.COLOR_RGB2GRAY) for f in frames]
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    into = np.zeros((*frames.shape[1:3], 2), np.float32)
    flows = [method.calc(a, b, into.copy()) for a, b in pairwise(grey)]
    return np.stack(flows).astype(np.float32)


def speeds(flow: Flow) -> NDArray[np.float32]:
    """[F - 1]: mean length of the flow between each frame and the next."""
    lengths: NDArray[np.float32] = np.linalg.norm(flow, axis=3).mean((1, 2), dtype=np.float32)
    return lengths


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
