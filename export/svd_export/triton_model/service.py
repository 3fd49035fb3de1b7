"""One engine that makes one video after the other, watched.  Knows nothing of Triton.

Letters in shapes: N videos, F frames, H W pixels.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.image import decode_image
from svd_engine.settings import check_seed
from svd_engine.video import as_bytes, to_uint8, write_video
from svd_export.triton_model import preview
from svd_export.triton_model.inputs import Request
from svd_export.triton_model.watch import Watch, WatchedBackend

OnStep = Callable[[int, bytes | None], None]  # (steps done, an animated WebP or None)


@dataclass(frozen=True)
class Made:
    videos: list[bytes]  # N mp4 files, or none when frames were asked for
    frames: np.ndarray | None  # [N,F,H,W,3] uint8
    stage_ms: dict[str, float]
    report: str  # JSON of svd_engine.report.RunReport


class Service:
    def __init__(self, bundle: Path, device: str) -> None:
        self.engine = VideoEngine.from_bundle(bundle, device=device)
        self.engine.set_progress_bar_config(disable=True)
        self.backend = self.engine.backend = WatchedBackend(self.engine.backend)

    def warm_up(self) -> None:
        """Loads every network and makes a video of one step.  Raises BundleError or BackendError."""
        self.backend.watch = Watch()
        size = self.engine.default.width, self.engine.default.height
        self.engine(Image.new("RGB", size, "grey"), num_inference_steps=1)

    def make(self, asked: Request, cancelled: Callable[[], bool], on_step: OnStep | None = None) -> Made:
        """The video of one request.  Raises Cancelled, SettingsError, ImageError, BackendError."""
        check_seed(asked.seed)
        arguments = dict(asked.sampling)
        if "latents" in arguments:
            arguments["latents"] = torch.from_numpy(arguments["latents"].copy())  # Triton's are read-only
        watch = self.backend.watch = Watch(cancelled, keep=asked.preview_every > 0)
        try:
            result = self.engine(
                decode_image(asked.image),
                generator=torch.Generator("cpu").manual_seed(asked.seed),
                output_type="pt",
                callback_on_step_end=self._callback(asked, on_step) if on_step else None,
                **arguments,
            )
            watch.check()
            started = time.perf_counter()
            pixels = [as_bytes(frames) for frames in result.frames]
            as_files = asked.output_type == "mp4"
            videos = [encoded(frames, ".mp4", asked.fps) for frames in pixels] if as_files else []
            stage_ms = {**result.report.stage_ms, "encode": (time.perf_counter() - started) * 1e3}
        finally:
            self.backend.watch = Watch()  # holds no tensors between requests
        frames = None if as_files else np.stack(pixels)
        return Made(videos, frames, stage_ms, result.report.model_dump_json())

    def close(self) -> None:
        self.engine.close()

    def _callback(self, asked: Request, on_step: OnStep) -> Callable[..., dict[str, Any]]:
        def callback(_: VideoEngine, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done = step + 1
            due = asked.preview_every and done % asked.preview_every == 0
            on_step(done, self._preview(asked.fps) if due else None)
            self.backend.watch.denoised = None
            return tensors

        return callback

    def _preview(self, fps: int) -> bytes:
        """The denoiser's present estimate of the first video, [F,3,H/8,W/8], as an animated WebP."""
        watch = self.backend.watch
        assert watch.pixels is not None
        assert watch.latent is not None
        assert watch.denoised is not None
        weights = preview.fit(watch.pixels, watch.latent)
        latents = watch.denoised[0] / self.engine.model.latent_scale
        return encoded(to_uint8(preview.project(latents, weights)), ".webp", fps)


def encoded(frames: np.ndarray, suffix: str, fps: int) -> bytes:
    with tempfile.TemporaryDirectory(prefix="svd-engine-") as folder:
        return write_video(frames, Path(folder, f"video{suffix}"), fps).read_bytes()
