"""Likeness and motion of videos whose likeness and motion are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from svd_bench.quality.held_out import HELD_OUT, held_out
from svd_bench.quality.metrics import Frames, contrast_kept, flow_difference, ssim, warp_error
from svd_engine.media.motion import optical_flow, psnr, speeds


def pan(x: int, y: int = 0, frames: int = 4) -> Frames:
    """A window of 96x128 that moves x and y pixels a frame over a photograph."""
    photograph: NDArray[np.uint8] = np.asarray(held_out(400, 600)["coffee"])
    windows = [photograph[150 + y * t :, 200 + x * t :][:96, :128] for t in range(frames)]
    return np.stack(windows).astype(np.float32) / 255


def noise(scale: float) -> Frames:
    return (scale * np.random.default_rng(0).standard_normal(pan(0).shape)).astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    grey = np.full((1, 8, 8, 3), 0.5, np.float32)
    assert psnr(grey, grey + 0.1) == pytest.approx(20, abs=1e-4)
    assert psnr(grey, grey) == float("inf")


def test_ssim_falls_with_noise_and_ignores_nothing_else() -> None:
    clip = pan(0)
    assert ssim(clip, clip) == pytest.approx(1)
    assert 1 > ssim(clip, clip + noise(0.02)) > ssim(clip, clip + noise(0.2)) > 0


@pytest.mark.parametrize(("x", "y"), [(2, 0), (0, 3), (-1, 1)])
def test_the_flow_of_a_pan_is_the_pan(x: int, y: int) -> None:
    flow = optical_flow(pan(x, y))
    assert flow.shape == (3, 96, 128, 2)
    np.testing.assert_allclose(np.median(flow, (0, 1, 2)), [-x, -y], atol=0.1)
    np.testing.assert_allclose(speeds(flow), np.hypot(x, y), rtol=0.25)


def test_flows_of_two_pans_differ_by_their_difference() -> None:
    assert flow_difference(pan(2), pan(2)) == 0
    assert flow_difference(pan(2), pan(0, 2)) == pytest.approx(np.hypot(2, 2), rel=0.25)


def test_motion_explains_a_pan_and_not_flicker() -> None:
    assert warp_error(pan(2)) < 0.25 * warp_error(pan(2) + noise(0.1))


def test_contrast_kept() -> None:
    clip = pan(0)
    clip[-1] = 0.5 + (clip[-1] - 0.5) / 4
    assert contrast_kept(clip) == pytest.approx(0.25, rel=1e-4)


def test_the_held_out_photographs_are_cut_to_shape() -> None:
    photographs = held_out(128, 224)
    assert list(photographs) == list(HELD_OUT)
    for image in photographs.values():
        assert image.mode == "RGB"
        assert image.width / image.height == pytest.approx(224 / 128, rel=0.01)
