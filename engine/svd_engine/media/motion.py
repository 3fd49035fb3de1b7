"""How alike frames are, and how they move.  Frames are [F, H, W, 3] in [0, 1]; flow in pixels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FrameArray = NDArray[np.float32]
Flow = NDArray[np.float32]  # [F - 1, H, W, 2]: where each pixel of a frame is in the next


def psnr(a: FrameArray, b: FrameArray) -> float:
    """Decibels; infinite for equal frames."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def optical_flow(frames: FrameArray) -> Flow:
    """DIS optical flow (Kroeger et al. 2016) between neighbouring frames.  Needs OpenCV."""
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
