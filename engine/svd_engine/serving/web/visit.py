"""One visitor: at most one job at a time, and the videos made so far, in a folder that only they know."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svd_engine.engine import VideoEngine
from svd_engine.errors import ImageError, OutputError, QueueFull
from svd_engine.media.image import decode_image
from svd_engine.media.video import MAX_GIF_FPS, as_bytes, write_video
from svd_engine.output import VideoOutput
from svd_engine.serving.jobs import Job, JobService
from svd_engine.serving.one_video import VideoRequest

CUT_SECONDS = 300  # without a byte, after which an upload has broken off


@dataclass(eq=False)
class Visit:
    """`folder` is made with the first video, and removed when the visit ends."""

    folder: Path
    job: Job | None = None
    videos: list[tuple[str, str]] = field(default_factory=list)  # file and caption, the newest first
    ended: bool = False

    def submit(
        self,
        service: JobService,
        engine: VideoEngine,
        photograph: Path | None,
        seed: int,
        arguments: Mapping[str, Any],
    ) -> Job:
        """Raises QueueFull while the last one runs or waits, too; ImageError."""
        if self.job is not None and not self.job.status.ended:
            raise QueueFull(
                "your visit",
                expected="one video at a time",
                got="another one",
                remedy="Wait for it, or cancel it.",
            )
        if photograph is None:
            raise ImageError(
                "photograph",
                expected="one",
                got="none",
                remedy="Drop one on the page, paste it, or choose it.",
            )
        try:
            content = photograph.read_bytes()
        except OSError as error:
            raise ImageError(
                "photograph",
                expected="one that was dropped here within the last day",
                got="one that the server has no more",
                remedy="Drop it again, paste it, or choose it.",
            ) from error
        image = decode_image(content, transparency=True)
        request = VideoRequest(image, seed, preview_every=1, arguments={**arguments, "output_type": "pt"})
        self.job = service.submit(request, engine)
        return self.job

    def cancel(self) -> None:
        if self.job is not None:
            self.job.cancel()

    def end(self) -> None:
        """Cancels the job and removes the videos."""
        self.ended = True
        self.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)

    def keep(self, output: VideoOutput, name: str) -> Path:
        """Writes the mp4.  Raises OutputError."""
        path = self.folder / secrets.token_urlsafe(8) / f"{name}.mp4"
        with _written(path):
            path.parent.mkdir(parents=True)
            write_video(as_bytes(output.frames[0]), path, output.report.settings.fps)
        self.videos.insert(0, (str(path), f"seed {output.report.seeds[0]}"))
        return path


def remove_cut_uploads(folder: Path) -> None:
    """What uploads that broke off, or met a full disk, have left: Gradio clears whole ones alone."""
    for file in folder.glob("tmp*"):
        with suppress(OSError):
            if file.is_file() and time.time() - file.stat().st_mtime > CUT_SECONDS:
                file.unlink()


def other_formats(output: VideoOutput, mp4: Path) -> dict[str, Path | None]:
    """The same video beside its mp4: "webp", "gif" (None for a rate it cannot hold) and "zip", of frames.

    Raises OutputError.
    """
    frames, fps = as_bytes(output.frames[0]), output.report.settings.fps
    with _written(mp4):
        webp = write_video(frames, mp4.with_suffix(".webp"), fps)
        gif = write_video(frames, mp4.with_suffix(".gif"), fps) if fps <= MAX_GIF_FPS else None
        folder = write_video(frames, mp4.with_suffix(""), fps)
        archive = Path(shutil.make_archive(str(mp4.with_suffix("")), "zip", folder))
        shutil.rmtree(folder)
    return {"webp": webp, "gif": gif, "zip": archive}


@contextmanager
def _written(result: Path) -> Iterator[None]:
    """What the system refuses becomes OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"result {result}",
            expected="room for it in the folder of temporary files",
            got=error.strerror or str(error),
            remedy="Make room there, or set TMPDIR to another folder and start the server again.",
        ) from error
