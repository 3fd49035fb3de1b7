"""`svd_generate` against Python on the checkpoint that ships, at its own size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from svd_engine import VideoEngine
from svd_engine.media.image import load_image
from tests.examples.conftest import Generate, Programs
from tests.support.paths import PHOTOGRAPH


def test_the_demo_s_frames_equal_python(
    programs: Programs, runtime: Path, demo_bundle: Path, tmp_path: Path
) -> None:
    with VideoEngine.from_bundle(demo_bundle, device="cpu") as engine:
        frames = engine(
            load_image(PHOTOGRAPH), num_inference_steps=3, output_type="pt",
            generator=torch.Generator("cpu").manual_seed(42),
        ).frames[0]  # fmt: skip
    generate = Generate(programs.plain, runtime)
    done = generate.video(demo_bundle, tmp_path / "out.f32", "--steps", 3, "--seed", 42)
    assert done.returncode == 0, done.stderr
    ours = np.fromfile(tmp_path / "out.f32", "<f4").reshape(frames.shape)
    assert np.abs(ours - frames.numpy()).max() <= 1e-4
