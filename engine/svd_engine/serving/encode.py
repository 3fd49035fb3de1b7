"""Frames to the content of a file, for a response that is sent and not written."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from svd_engine.media.video import write_video


def encode(frames: np.ndarray, suffix: str, fps: int) -> bytes:
    """A file of the format that `suffix` names.  frames: [F,H,W,3] bytes.  Raises what `write_video` does."""
    with tempfile.TemporaryDirectory(prefix="svd-engine-") as folder:
        return write_video(frames, Path(folder, f"video{suffix}"), fps).read_bytes()
