"""What a visitor is told of a job, as HTML: place in the queue, progress, time left, preview, errors."""

from __future__ import annotations

import base64
import html
import io
import logging
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image

from svd_engine.errors import (
    Cancelled,
    ImageError,
    NonFiniteOutput,
    OutOfMemory,
    QueueFull,
    SettingsError,
    SvdEngineError,
    WaitedTooLong,
)
from svd_engine.serving.jobs import Job
from svd_engine.serving.one_video import Status
from svd_engine.serving.watch import Progress

log = logging.getLogger(__name__)

PREVIEW_MS = 125  # a frame
STAGES = {
    "": "Starting",
    "preprocess": "Reading the photograph",
    "load": "Loading the networks",
    "compile_kernels": "Compiling kernels",
    "image_encoder": "Encoding the photograph",
    "vae_encoder": "Encoding the photograph",
    "denoiser": "Denoising",
    "vae_decoder": "Decoding the frames",
    "postprocess": "Decoding the frames",
}
TOLD = (
    Cancelled, ImageError, NonFiniteOutput, OutOfMemory, QueueFull, SettingsError, WaitedTooLong,
)  # fmt: skip


class TimeLeft:
    """Of the denoising, from the evaluations that were seen."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # seconds, evaluations done then

    def seconds(self, progress: Progress, now: float | None = None) -> float | None:
        """None until two evaluations were seen, and after the last."""
        now = time.monotonic() if now is None else now
        left = progress.evaluations - progress.evaluation
        if not progress.evaluation or not left:
            return None
        if self._first is None:
            self._first = now, progress.evaluation
        started, done_then = self._first
        if progress.evaluation == done_then:
            return None
        return (now - started) / (progress.evaluation - done_then) * left


@dataclass(frozen=True)
class Shown:
    """What the page says of a job, to see whether it has changed."""

    line: str
    done: int = 0
    of: int = 0
    preview: int = 0  # id of the newest


class JobStatus:
    """Renders one job, again when there is something new."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._left = TimeLeft()
        self._shown: Shown | None = None

    def news(self) -> str | None:
        """HTML, or None while nothing has changed."""
        progress, preview = self.job.progress, self.job.preview
        shown = Shown(self._line(progress), progress.evaluation, progress.evaluations, id(preview))
        if shown == self._shown:
            return None
        self._shown = shown
        picture = "" if preview is None else _picture(preview)
        value = f' max="{shown.of}" value="{shown.done}"' if shown.of else ""
        bar = f'<progress aria-label="Progress"{value}></progress>'
        return f'<div class="svd-status">{bar}<p role="status">{html.escape(shown.line)}</p>{picture}</div>'

    def _line(self, progress: Progress) -> str:
        if self.job.status is Status.WAITING:
            ahead = self.job.ahead
            return f"In the queue, {ahead} {'video' if ahead == 1 else 'videos'} before yours"
        line = STAGES.get(progress.stage, progress.stage)
        if progress.stage == "denoiser" and progress.steps:
            line += f", step {progress.step} of {progress.steps}"
            if (seconds := self._left.seconds(progress)) is not None:
                line += f", {duration(seconds)} left"
        if progress.stage == "vae_decoder" and progress.frames:
            line += f", {progress.decoded / progress.frames:.0%}"
        return line


def duration(seconds: float) -> str:
    """Whole seconds, from two minutes on whole minutes."""
    return f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60)} min"


def done(line: str) -> str:
    return f'<div class="svd-status"><p role="status">{html.escape(line)}</p></div>'


def failed(error: BaseException) -> str:
    """In the visitor's words; what only the server's owner can mend is told in its log."""
    return f'<div class="svd-status svd-error"><p role="alert">{html.escape(in_words(error))}</p></div>'


def in_words(error: BaseException) -> str:
    if isinstance(error, Cancelled):
        return "Cancelled."
    if isinstance(error, SvdEngineError) and isinstance(error, TOLD):
        return f"{error.problem[0].upper()}{error.problem[1:]}. {error.remedy}"
    log.error("a video failed", exc_info=error)
    return "The server could not make this video. Its log says why."


def _picture(preview: np.ndarray) -> str:
    """An animated WebP of [F,h,w,3] bytes, in the page itself."""
    first, *others = map(Image.fromarray, preview)
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, duration=PREVIEW_MS, loop=0, quality=80)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="Preview of the video" src="data:image/webp;base64,{content}">'
