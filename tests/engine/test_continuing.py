"""A clip goes on: its frames, the new ones, and the seam between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine import SettingsError, VideoEngine, continue_video, continuing, write_video
from svd_engine.cli.main import main
from svd_engine.media.video import as_bytes
from svd_engine.report import RunReport
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.test_engine import seeded
from tests.engine.watching import fake_engine
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH
from tests.support.pictures import photo_clip

CALL: dict[str, Any] = {"num_inference_steps": 2, "motion_bucket_id": 90}
CLIP = photo_clip()[:4, :64, :128]  # of the fake engine's size
TINY = photo_clip()[:4, :HEIGHT, :WIDTH]


def test_the_clip_comes_first_then_all_but_the_first_new_frame() -> None:
    engine, _ = fake_engine()
    longer = continue_video(engine, CLIP, generator=seeded(), output_type="np", **CALL)
    alone = engine(Image.fromarray(CLIP[-1]), generator=seeded(), output_type="np", **CALL)
    frames = longer.frames
    assert isinstance(frames, np.ndarray)
    assert frames.shape == (1, 4 + 5 - 1, 64, 128, 3)
    assert np.array_equal(as_bytes(frames[0, :4]), CLIP)
    assert np.array_equal(frames[0, 4:], alone.frames[0][1:])
    assert longer.report.settings == alone.report.settings


def test_a_path_and_pil_images_are_clips_too(tmp_path: Path) -> None:
    engine, _ = fake_engine()
    folder = write_video(CLIP, tmp_path / "frames", 7)
    images = [Image.fromarray(frame) for frame in CLIP]
    by_path, by_images = (continue_video(engine, c, generator=seeded(), **CALL) for c in (folder, images))
    (frames,) = by_path.frames
    assert [frame.size for frame in frames] == [(128, 64)] * 8
    assert all(np.array_equal(a, b) for a, b in zip(frames, by_images.frames[0], strict=True))
    assert by_path.save(tmp_path / "longer.webp") == [tmp_path / "longer.webp"]


def test_each_video_of_several_has_its_seam() -> None:
    engine, _ = fake_engine()
    made = continue_video(engine, CLIP, num_videos_per_prompt=2, generator=seeded(), output_type="pt", **CALL)
    assert made.frames.shape == (2, 8, 3, 64, 128)
    assert len(made.report.seams) == 2
    assert torch.equal(made.frames[0, :4], made.frames[1, :4])


def test_the_seam_is_told_from_the_clip_s_own_frames() -> None:
    """A camera at 8 pixels a frame goes on, stands still, or jumps."""
    clip = photo_clip()
    goes_on, stands, jumps = (
        continuing.seam(clip[:5], first) for first in (clip[5], clip[4], clip[9][::-1].copy())
    )
    assert goes_on.flow is not None
    assert goes_on.median_flow == pytest.approx(np.hypot(8, 3), rel=0.15)
    assert goes_on.flow == pytest.approx(goes_on.median_flow, rel=0.15)
    assert goes_on.psnr == pytest.approx(goes_on.median_psnr, abs=2)
    assert stands.flow == pytest.approx(0, abs=0.1)
    assert stands.psnr == float("inf")
    assert jumps.psnr < goes_on.psnr - 2


def test_without_opencv_the_flow_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuing, "find_spec", lambda name: None)
    measured = continuing.seam(CLIP, CLIP[0])
    assert (measured.flow, measured.median_flow) == (None, None)
    assert measured.psnr > 0


@pytest.mark.parametrize(
    ("clip", "arguments", "message"),
    [
        (CLIP[:1], {}, "clip: expected two frames or more, got one"),
        (CLIP, {"height": 128}, "height: expected the clip's, 64 pixels, got 128"),
        (CLIP, {"width": 64}, "width: expected the clip's, 128 pixels, got 64"),
        (CLIP, {"fit": "crop"}, "fit: expected nothing: the clip's last frame is the image"),
        (CLIP, {"num_frames": 1}, "num_frames: expected 2 or more"),
        (CLIP, {"output_type": "latent"}, "output_type: expected pil, np, pt, got 'latent'"),
    ],
)
def test_what_cannot_be_continued_is_refused_before_anything_runs(
    clip: np.ndarray, arguments: dict[str, Any], message: str
) -> None:
    engine, backend = fake_engine()
    with pytest.raises(SettingsError, match=message):
        continue_video(engine, clip, **CALL, **arguments)
    assert backend.open_now == []


def test_the_command_continues_a_clip_and_reports_the_seam(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, output, report = tmp_path / "clip.webp", tmp_path / "frames", tmp_path / "run.json"
    write_video(TINY, clip, 12)
    arguments = ("--bundle", tiny_bundle, "--device", "cpu", "--steps", 2, "--report", report)
    assert call(main, "generate", "--continue-from", clip, "-o", output, *arguments) == 0
    assert len(list(output.iterdir())) == 4 + FRAMES - 1
    printed = capsys.readouterr()
    assert "the clip plays at 12 frames a second, the video will at 7" in printed.err
    (seam,) = RunReport.model_validate_json(report.read_text()).seams
    assert (
        f"seam: PSNR {seam.psnr:.1f} dB, {seam.median_psnr:.1f} between the clip's frames; flow "
        in printed.out
    )


def test_a_seam_between_equal_frames_is_strict_json(tmp_path: Path) -> None:
    engine, _ = fake_engine()
    still = continue_video(engine, np.repeat(CLIP[:1], 3, axis=0), **CALL).report.model_dump_json()
    (seam,) = json.loads(still)["seams"]
    assert seam["median_psnr"] == "Infinity"
    assert RunReport.model_validate_json(still).seams[0].median_psnr == float("inf")


def test_the_demo_s_own_clip_goes_on() -> None:
    """The seam is no jump: what crosses it is as like as two neighbours of the clip, to a few decibels."""
    photograph = Image.open(PHOTOGRAPH).convert("RGB").crop((0, 0, 384, 256))
    settings: dict[str, Any] = {"num_inference_steps": 5, "schedule": "ays", "num_frames": 4}
    with VideoEngine.from_checkpoint("demo", backend="eager", device="cpu") as engine:
        size = {"height": 64, "width": 96}
        first = engine(photograph, generator=seeded(), output_type="np", **size, **settings).frames[0]
        longer = continue_video(engine, first, generator=seeded(), output_type="np", **settings)
    (seam,) = longer.report.seams
    assert longer.frames[0].shape == (4 + 3, 64, 96, 3)
    assert seam.psnr > seam.median_psnr - 6
