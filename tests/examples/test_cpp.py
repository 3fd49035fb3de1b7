"""`svd_generate` against Python on the tiny bundle.  Under sanitizers."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.bundle.manifest import Runtime
from svd_engine.media.image import load_image
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.examples.conftest import CPP, Generate, Programs
from tests.support import damage
from tests.support.paths import PHOTOGRAPH

TOLERANCE = 1e-4  # of frames in [0, 1], on the same backend
SHAPE = (FRAMES, 3, HEIGHT, WIDTH)


@cache
def python_frames(bundle: Path, seed: int, **settings: Any) -> np.ndarray:
    """Only to be read: made once for all builds and guidance modes, which give the same frames."""
    with VideoEngine.from_bundle(bundle, device="cpu") as engine:
        result = engine(
            load_image(PHOTOGRAPH), output_type="pt",
            generator=torch.Generator("cpu").manual_seed(seed), **settings,
        )  # fmt: skip
    frames: np.ndarray = result.frames[0].numpy()
    return frames


def draws(path: Path, seed: int) -> Path:
    """The file of --noise with Python's draws, in Python's order."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latent = (1, FRAMES, 4, HEIGHT // 2, WIDTH // 2)  # the tiny VAE halves once
    both = [torch.randn(shape, generator=generator).numpy() for shape in ((1, 3, HEIGHT, WIDTH), latent)]
    path.write_bytes(b"".join(draw.astype("<f4").tobytes() for draw in both))
    return path


def only(bundle: Path, into: Path, guidance: str) -> Path:
    """The bundle with the profiles of one guidance mode."""
    copy = damage.copy(bundle, into)

    def change(manifest: dict[str, Any]) -> None:
        manifest["profiles"] = [p for p in manifest["profiles"] if p["guidance"] == guidance]

    damage.edit(copy, change)
    return copy


def ran(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("guidance", "flags", "settings"),
    [
        ("single", ["--steps", 4], {"num_inference_steps": 4}),
        (
            "single",
            ["--steps", 3, "--max-guidance-scale", 0.5, "--fps", 12, "--motion-bucket-id", 1023],
            {"num_inference_steps": 3, "max_guidance_scale": 0.5, "fps": 12, "motion_bucket_id": 1023},
        ),
        *(
            (
                guidance,
                ["--steps", "2.0", "--min-guidance-scale", 3, "--max-guidance-scale", 1, "--fit", "pad"],
                {
                    "num_inference_steps": 2,
                    "min_guidance_scale": 3.0,
                    "max_guidance_scale": 1.0,
                    "fit": "pad",
                },
            )
            for guidance in ("batched", "single")
        ),
        (
            "batched",
            ["--steps", 1, "--max-guidance-scale", 1, "--fit", "crop", "--motion-bucket-id", 63.75],
            {"num_inference_steps": 1, "max_guidance_scale": 1.0, "fit": "crop", "motion_bucket_id": 63.75},
        ),
        (
            "batched",
            ["--steps", 2, "--min-guidance-scale", 2.5, "--noise-aug-strength", 0.3],
            {"num_inference_steps": 2, "min_guidance_scale": 2.5, "noise_aug_strength": 0.3},
        ),
    ],
)
def test_frames_equal_python(
    generate: Generate, tiny_bundle: Path, tmp_path: Path,
    guidance: str, flags: list[object], settings: dict[str, Any],
) -> None:  # fmt: skip
    """Both guidance modes; a chunk that does not divide.  Defaults: `test_draws_by_file_and_by_seed`."""
    wanted = python_frames(tiny_bundle, 42, **settings)
    bundle = only(tiny_bundle, tmp_path, guidance)
    assert wanted.std() > 0.05  # a picture, not a plain
    ran(generate.video(bundle, tmp_path / "out.f32", *flags, "--seed", 42))
    frames = np.fromfile(tmp_path / "out.f32", "<f4").reshape(SHAPE)
    assert np.abs(frames - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("build", ["plain", "sanitised"])
def test_draws_by_file_and_by_seed(
    programs: Programs, runtime: Path, tiny_bundle: Path, tmp_path: Path, build: str
) -> None:
    wanted = python_frames(tiny_bundle, 42, num_inference_steps=4)
    generate = Generate(getattr(programs, build), runtime)
    for source in (["--noise", draws(tmp_path / "noise.f32", 42)], ["--seed", 42]):
        ran(generate.video(tiny_bundle, tmp_path / "out.f32", "--steps", 4, *source))
        frames = np.fromfile(tmp_path / "out.f32", "<f4").reshape(SHAPE)
        assert np.abs(frames - wanted).max() <= TOLERANCE


def test_every_setting_reaches_the_frames(
    programs: Programs, runtime: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """So that a setting that both sides ignored would be seen."""
    generate = Generate(programs.plain, runtime)
    changes = (
        [], ["--steps", 3], ["--seed", 1], ["--fps", 30], ["--motion-bucket-id", 1],
        ["--motion-bucket-id", 1.5],
        ["--min-guidance-scale", 2], ["--max-guidance-scale", 4], ["--noise-aug-strength", 0.5],
        ["--max-guidance-scale", 1],
    )  # fmt: skip
    videos = []
    for change in changes:
        ran(generate.video(tiny_bundle, tmp_path / "out.f32", "--steps", 2, *change))
        videos.append((tmp_path / "out.f32").read_bytes())
    assert len(set(videos)) == len(changes)
    ran(generate.video(tiny_bundle, tmp_path / "again.f32", "--steps", 2))
    assert (tmp_path / "again.f32").read_bytes() == videos[0]


def test_png_frames_are_the_same_frames(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    done = generate.video(tiny_bundle, tmp_path / "frames/", "--steps", 2)
    ran(done)
    assert "step 2 of 2\n" in done.stderr
    assert "decode chunk 2; ONNX Runtime " in done.stdout
    ran(generate.video(tiny_bundle, tmp_path / "out.f32", "--steps", 2))
    frames = np.rint(np.fromfile(tmp_path / "out.f32", "<f4").reshape(SHAPE) * np.float32(255))
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files] == [f"frame_{index:04d}.png" for index in range(FRAMES)]
    for file, frame in zip(files, frames, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), frame.transpose(1, 2, 0))


def test_y4m_plays(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    """FFmpeg reads size, rate and count, and its colours are ours but for the rounding of 8-bit YUV."""
    import av

    ran(generate.video(tiny_bundle, tmp_path / "out.y4m", "--steps", 2, "--fps", 11))
    ran(generate.video(tiny_bundle, tmp_path / "out.f32", "--steps", 2, "--fps", 11))
    wanted = np.fromfile(tmp_path / "out.f32", "<f4").reshape(SHAPE) * 255
    with av.open(str(tmp_path / "out.y4m")) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == 11
        assert (stream.width, stream.height, stream.pix_fmt) == (WIDTH, HEIGHT, "yuv444p")
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
    assert len(shown) == FRAMES
    difference = np.abs(np.stack(shown).astype(float) - wanted.transpose(0, 2, 3, 1))
    assert difference.max() <= 3.5
    assert difference.mean() < 1


def test_an_existing_file_is_replaced(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "out.y4m").write_text("old")
    ran(generate.video(tiny_bundle, tmp_path / "out.y4m", "--steps", 1))
    assert (tmp_path / "out.y4m").read_bytes().startswith(b"YUV4MPEG2 W48 H32 F7:1 ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.y4m"]


def test_the_profile_asked_for(
    programs: Programs, runtime: Path, tiny_2_25_bundle: Path, tmp_path: Path
) -> None:
    """One of two, and decoded in one chunk."""
    generate = Generate(programs.plain, runtime)
    for frames in (2, 25):
        ran(generate.video(tiny_2_25_bundle, tmp_path / "out.f32", "--steps", 1, "--frames", frames))
        assert (tmp_path / "out.f32").stat().st_size == 4 * frames * 3 * HEIGHT * WIDTH


def test_help_and_nothing(programs: Programs) -> None:
    done = subprocess.run([programs.plain, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    known = set(
        re.findall(r"--[a-z-]+", (CPP / "svd_generate.cpp").read_text().split('R"(')[1].split(')"')[0])
    )
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert subprocess.run([programs.plain], capture_output=True).returncode == 2


def test_compilers_have_nothing_to_say(programs: Programs) -> None:
    assert not re.search(r"warning", programs.compiling, re.IGNORECASE)


def test_it_knows_the_schema_of_manifests_as_it_is() -> None:
    made = runpy.run_path(str(CPP / "manifest_schema.py"))["header"]()
    message = "run: python examples/cpp/manifest_schema.py"
    assert (CPP / "manifest_schema.hpp").read_text(encoding="utf-8") == made, message
    assert len(made) < 16_000  # the longest text that MSVC takes


def test_it_knows_every_word_of_that_schema() -> None:
    """A word that schema.hpp does not know would be a check that it leaves out."""
    words: set[str] = set()

    def read(schema: Any) -> None:
        for word, value in schema.items():
            words.add(word)
            named = isinstance(value, dict) and word in ("properties", "$defs", "patternProperties")
            for part in value.values() if named else value if isinstance(value, list) else [value]:
                if isinstance(part, dict):
                    read(part)

    read(json.loads((CPP / "manifest_schema.hpp").read_text().split("json(")[1].split(")json")[0]))
    known = set(re.findall(r'"(\$?\w+)"', (CPP / "schema.hpp").read_text()))
    assert words - known == {"$defs"}


def test_manifest_fields_that_it_reads_are_in_the_schema(tiny_bundle: Path) -> None:
    """A field renamed in Python is one missing here."""
    schema = json.loads((tiny_bundle / "manifest.schema.json").read_text())
    known = {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}
    known |= set(get_args(Runtime))
    sources = [(CPP / name).read_text() for name in ("svd.hpp", "svd_tensorrt.cu")]
    read = {name for source in sources for name in re.findall(r'(?:\bat|value)\("(\w+)"', source)}
    tensors = {"x", "sigma", "denoised", "guidance", "first_latent", "embedding"}
    assert len(read) > 25
    assert read - tensors <= known
