"""`svd_generate` against Python on the tiny bundle, and each of its refusals.  Under sanitizers."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from svd_engine import VideoEngine
from svd_engine.image import cover, load_image
from tests import damage
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.examples.conftest import CPP, Generate, Programs
from tests.paths import PHOTOGRAPH

TOLERANCE = 1e-4  # of frames in [0, 1], on the same backend
SHAPE = (FRAMES, 3, HEIGHT, WIDTH)


def python_frames(bundle: Path, seed: int, **settings: Any) -> np.ndarray:
    with VideoEngine.from_bundle(bundle, device="cpu") as engine:
        result = engine(
            cover(load_image(PHOTOGRAPH), HEIGHT, WIDTH), output_type="pt",
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


@pytest.mark.parametrize("build", ["plain", "sanitised"])
@pytest.mark.parametrize(
    ("guidance", "flags", "settings"),
    [
        ("batched", ["--steps", 4], {"num_inference_steps": 4}),
        ("single", ["--steps", 4], {"num_inference_steps": 4}),
        (
            "batched",
            ["--steps", 1, "--max-guidance-scale", 1],
            {"num_inference_steps": 1, "max_guidance_scale": 1.0},
        ),
        (
            "single",
            ["--steps", 3, "--max-guidance-scale", 0.5, "--fps", 12, "--motion-bucket-id", 1023],
            {"num_inference_steps": 3, "max_guidance_scale": 0.5, "fps": 12, "motion_bucket_id": 1023},
        ),
        (
            "batched",
            ["--steps", 2, "--min-guidance-scale", 2.5, "--noise-aug-strength", 0.3],
            {"num_inference_steps": 2, "min_guidance_scale": 2.5, "noise_aug_strength": 0.3},
        ),
    ],
)
def test_frames_equal_python(
    programs: Programs, runtime: Path, tiny_bundle: Path, tmp_path: Path,
    build: str, guidance: str, flags: list[object], settings: dict[str, Any],
) -> None:  # fmt: skip
    """The same draws, both by file and by seed; both guidance modes; a chunk that does not divide."""
    bundle = only(tiny_bundle, tmp_path, guidance)
    wanted = python_frames(bundle, 42, **settings)
    assert wanted.std() > 0.05  # a picture, not a plain
    generate = Generate(getattr(programs, build), runtime)
    for source in (["--noise", draws(tmp_path / "noise.f32", 42)], ["--seed", 42]):
        ran(generate.video(bundle, tmp_path / "out.f32", *flags, *source))
        frames = np.fromfile(tmp_path / "out.f32", "<f4").reshape(SHAPE)
        assert np.abs(frames - wanted).max() <= TOLERANCE


def test_every_setting_reaches_the_frames(
    programs: Programs, runtime: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """So that a setting that both sides ignored would be seen."""
    generate = Generate(programs.plain, runtime)
    changes = (
        [], ["--steps", 3], ["--seed", 1], ["--fps", 30], ["--motion-bucket-id", 1],
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
    programs: Programs, runtime: Path, tiny_14_25_bundle: Path, tmp_path: Path
) -> None:
    """One of two, and decoded in one chunk."""
    generate = Generate(programs.plain, runtime)
    for frames in (14, 25):
        ran(generate.video(tiny_14_25_bundle, tmp_path / "out.f32", "--steps", 1, "--frames", frames))
        assert (tmp_path / "out.f32").stat().st_size == 4 * frames * 3 * HEIGHT * WIDTH


def test_help_and_nothing(programs: Programs) -> None:
    done = subprocess.run([programs.plain, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    known = set(
        re.findall(r"--[a-z-]+", (CPP / "svd_generate.cpp").read_text().split('R"(')[1].split(')"')[0])
    )
    assert known <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert subprocess.run([programs.plain], capture_output=True).returncode == 2


def refused(
    done: subprocess.CompletedProcess[str], code: int, message: str, folder: Path, left: set[str]
) -> None:
    """The four parts, the exit code, and no file that was not there before."""
    assert done.returncode == code, done.stderr
    assert re.search(r"^error: .+: expected .+, got .+\. .+", done.stderr, re.DOTALL | re.MULTILINE), (
        done.stderr
    )
    assert message in done.stderr
    assert {path.name for path in folder.iterdir()} == left


WRONG_USAGE: dict[str, tuple[list[object], str]] = {
    "an unknown option": (["--sede", 1], "option: expected -o, --steps"),
    "an option without a value": (["--seed"], "option --seed: expected a value"),
    "too many words": (["more"], "arguments: expected BUNDLE PHOTO -o OUT"),
    "steps": (["--steps", 0], "--steps: expected a whole number from 1 to 1000000, got '0'"),
    "steps of text": (["--steps", "4x"], "got '4x'"),
    "fps": (["--fps", -1], "got '-1'"),
    "motion": (["--motion-bucket-id", 1024], "from 0 to 1023"),
    "noise": (["--noise-aug-strength", -0.1], "a finite number of 0 or more"),
    "guidance": (["--max-guidance-scale", "nan"], "a finite number"),
    "guidance of text": (["--min-guidance-scale", "1.0x"], "got '1.0x'"),
    "seed": (["--seed", 2**64], "from 0 to 18446744073709551615"),
    "provider": (["--provider", "tpu"], "--provider: expected cpu, cuda or tensorrt, got 'tpu'"),
    "profile": (["--frames", 5], "one of its profiles of batch 1 (3 frames, 32x48, batch 1, batched"),
    "suffix": (["-o", "video.mp4"], "output video.mp4: expected .y4m, .f32, or no suffix"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_USAGE)
def test_wrong_usage_is_2(generate: Generate, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    flags, message = WRONG_USAGE[name]
    refused(generate.video(tiny_bundle, tmp_path / "out.y4m", *flags), 2, message, tmp_path, set())


def test_machine_without_what_is_asked(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    """Nothing falls back to the CPU."""
    out = tmp_path / "out.y4m"
    done = generate.video(tiny_bundle, out, "--provider", "cuda")
    refused(done, 1, " on cuda: expected CUDAExecutionProvider, got ", tmp_path, set())
    done = generate.video(tiny_bundle, out, "--provider", "tensorrt")
    refused(done, 1, "provider tensorrt: expected a program built with TensorRT", tmp_path, set())
    done = generate.video(tiny_bundle, out, "--runtime", tmp_path / "none.so")
    refused(done, 1, "none.so: expected a library that opens", tmp_path, set())
    old = tmp_path / "libold.so"  # a runtime whose API is older than the headers
    source = (
        "static const void* get(unsigned v) { return 0; }"
        'static const char* version(void) { return "1.9.0"; }'
        "static struct { const void* (*get)(unsigned); const char* (*version)(void); } base = {get, version};"
        "const void* OrtGetApiBase(void) { return &base; }"
    )
    command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(old)]
    subprocess.run(command, input=source, text=True, check=True)
    done = generate.video(tiny_bundle, out, "--runtime", old)
    refused(done, 1, "expected release 1.21 or newer, got 1.9.0", tmp_path, {"libold.so"})


def test_outputs_that_cannot_be_written(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "folder.y4m").mkdir()
    there = {"taken", "folder.y4m"}
    for name, message in {
        "taken": "expected an empty folder, or nothing yet",
        "folder.y4m": "expected a file, or nothing yet",
        "missing/out.y4m": "a folder " + str(tmp_path / "missing") + " that can be written, got No such file",
    }.items():
        refused(generate.video(tiny_bundle, tmp_path / name), 1, message, tmp_path, there)


@pytest.mark.parametrize("name", ["out.y4m", "out.f32", "frames"])
def test_a_full_disk_leaves_nothing(generate: Generate, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    """Files may grow to 1000 bytes; the video is larger."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = generate.video(tiny_bundle, tmp_path / name, "--steps", 1, preexec_fn=small)
    refused(done, 1, "expected to write it", tmp_path, set())


def test_noise_that_does_not_fit(generate: Generate, tiny_bundle: Path, tmp_path: Path) -> None:
    noise = draws(tmp_path / "noise.f32", 0)
    noise.write_bytes(noise.read_bytes()[:-1])
    done = generate.video(tiny_bundle, tmp_path / "out.y4m", "--noise", noise)
    size = 4 * (3 * HEIGHT * WIDTH + FRAMES * 4 * (HEIGHT // 2) * (WIDTH // 2))
    refused(done, 1, f"expected {size} bytes: float32, 4608 for", tmp_path, {"noise.f32"})
    assert f"got {size - 1} bytes" in done.stderr
    done = generate.video(tiny_bundle, tmp_path / "out.y4m", "--noise", tmp_path / "none")
    refused(done, 1, "got nothing at that path", tmp_path, {"noise.f32"})


@pytest.mark.parametrize(
    ("photo", "got"), [("none.png", "nothing at that path"), (".", "a folder, a device")]
)
def test_no_picture(generate: Generate, tiny_bundle: Path, tmp_path: Path, photo: str, got: str) -> None:
    """Damaged ones are in test_cpp_pixels.py."""
    done = generate.video(tiny_bundle, tmp_path / "out.y4m", photo=tmp_path / photo)
    refused(done, 1, f"expected a file that can be read, got {got}", tmp_path, set())


def drop(*path: str) -> Callable[[Path], None]:
    """Takes a field out of the manifest."""

    def spoil(bundle: Path) -> None:
        def change(manifest: Any) -> None:
            for step in path[:-1]:
                manifest = manifest[step]
            del manifest[path[-1]]

        damage.edit(bundle, change)

    return spoil


def without_guidance(manifest: dict[str, Any]) -> None:
    spec = next(e["spec"] for e in manifest["networks"] if e["spec"]["key"].endswith("batched"))
    spec["inputs"] = [tensor for tensor in spec["inputs"] if tensor["name"] != "guidance"]


def without_encoder(manifest: dict[str, Any]) -> None:
    manifest["networks"] = [e for e in manifest["networks"] if e["spec"]["network"] != "vae_encoder"]


def linked(bundle: Path) -> None:
    (bundle / "denoiser.bin").rename(bundle / "elsewhere.bin")
    (bundle / "denoiser.bin").symlink_to("elsewhere.bin")


def not_finite(bundle: Path) -> None:
    size = (bundle / "vae_encoder.bin").stat().st_size
    (bundle / "vae_encoder.bin").write_bytes(np.full(size // 4, np.nan, "<f4").tobytes())
    damage.trust(bundle, "vae_encoder.bin")


def no_graph(bundle: Path) -> None:
    graph = damage.network(bundle, "image_encoder")["graph"]
    (bundle / graph).write_bytes(b"no graph")
    damage.trust(bundle, graph)


def cut(bundle: Path) -> None:
    content = (bundle / "denoiser.bin").read_bytes()
    (bundle / "denoiser.bin").write_bytes(content[:-1])


def another_graph(bundle: Path) -> None:
    """The decoder of one frame in the place of the one of two."""
    one, two = (f"vae_decoder-t{frames}-{HEIGHT}x{WIDTH}.onnx" for frames in (1, CHUNK))
    shutil.copy(bundle / one, bundle / two)
    damage.trust(bundle, two)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda bundle: damage.edit(bundle, change)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "expected a folder with manifest.json, got no such folder"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "got no such file"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "expected JSON that follows"),
    "a list": (lambda b: (b / "manifest.json").write_text("[]"), "expected JSON that follows"),
    "another format": (edit(lambda m: m.update(format=2)), "expected bundle format 1, got format 2"),
    "no format": (drop("format"), "key 'format' not found"),
    "no sigma": (drop("model", "sigma_max"), "key 'sigma_max' not found"),
    "no profile": (edit(lambda m: m.update(profiles=[])), "expected numbers of at least 1"),
    "no frames": (edit(lambda m: m["profiles"][0].update(frames=0)), "expected numbers of at least 1"),
    "a text for a number": (edit(lambda m: m["model"].update(rho="7")), "type must be number"),
    "a missing tensor": (edit(without_guidance), "guidance float32 [1,3], -> denoised"),
    "a missing network": (edit(without_encoder), "network vae_encoder-b1-32x48 of bundle"),
    "a file not listed": (drop("files", "denoiser.bin"), "denoiser.bin without one"),
    "a missing file": (lambda b: (b / "denoiser.bin").unlink(), "got no such file"),
    "a file cut off": (cut, "file denoiser.bin of bundle"),
    "a link": (linked, "got a link"),
    "a path outside": (
        edit(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        "a path that leaves the bundle",
    ),
    "weights altered": (lambda b: damage.flip(b / "denoiser.bin"), "file denoiser.bin of bundle"),
    "a graph altered": (lambda b: damage.flip(b / "image_encoder-b1.onnx"), "expected sha256 "),
    "a graph that is none": (no_graph, "image_encoder-b1: expected a run without error"),
    "weights of NaN": (not_finite, "output of vae_encoder (ONNX Runtime "),
    "another graph": (another_graph, f"vae_decoder-t{CHUNK}-{HEIGHT}x{WIDTH}: expected a run without error"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_bundle_is_refused(generate: Generate, tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    spoil, message = SPOILT[name]
    work = tmp_path / "work"
    work.mkdir()
    bundle = damage.copy(tiny_bundle, tmp_path)
    spoil(bundle)
    refused(generate.video(bundle, work / "out.y4m", "--steps", 1), 1, message, work, set())


def test_the_header_can_be_read_at_a_sitting(programs: Programs) -> None:
    """And compilers have nothing to say about any of it."""
    assert len((CPP / "svd.hpp").read_text().splitlines()) < 500
    assert not re.search(r"warning", programs.compiling, re.IGNORECASE)


def test_manifest_fields_that_it_reads_are_in_the_schema(tiny_bundle: Path) -> None:
    """A field renamed in Python is one missing here."""
    schema = json.loads((tiny_bundle / "manifest.schema.json").read_text())
    known = {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}
    sources = [(CPP / name).read_text() for name in ("svd.hpp", "svd_tensorrt.cu")]
    read = {name for source in sources for name in re.findall(r'(?:\bat|value)\("(\w+)"', source)}
    tensors = {"x", "sigma", "denoised", "guidance", "first_latent", "embedding"}
    assert len(read) > 25
    assert read - tensors <= known
