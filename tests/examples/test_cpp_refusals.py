"""`svd_generate`: each of its refusals says what, leaves nothing and has its exit code."""

from __future__ import annotations

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

from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.examples.conftest import Generate
from tests.support import damage, hostile_manifests


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
    "steps and a half": (["--steps", 4.5], "--steps: expected a whole number from 1 to 1000000, got '4.5'"),
    "motion": (["--motion-bucket-id", 1024], "a number from 0 to 1023"),
    "fit": (["--fit", "cover"], "--fit: expected stretch, crop or pad, got 'cover'"),
    "decode chunk": (["--decode-chunk-size", 1], "got 3 frames of 32x48, decode chunk 1"),
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
    noise, size = tmp_path / "noise.f32", 4 * (3 * HEIGHT * WIDTH + FRAMES * 4 * (HEIGHT // 2) * (WIDTH // 2))
    noise.write_bytes(bytes(size - 1))
    done = generate.video(tiny_bundle, tmp_path / "out.y4m", "--noise", noise)
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
    graph = damage.network(bundle, "image_encoder")["graphs"]["onnxruntime"]
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


def conditioned(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[Path], None]:
    """Changes the fields of what the denoiser is told."""
    return edit(lambda m: change(m["model"]["architecture"]["conditioning"]["fields"]))


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "expected a folder with manifest.json, got no such folder"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "got no such file"),
    "not JSON": (lambda b: (b / "manifest.json").write_text("{"), "expected JSON that follows"),
    "a list": (lambda b: (b / "manifest.json").write_text("[]"), "expected JSON that follows"),
    "another format": (edit(lambda m: m.update(format=1)), "expected bundle format 3, got format 1"),
    "no format": (drop("format"), "key 'format' not found"),
    "no sigma": (drop("model", "sigma_max"), "field model.sigma_max: expected a field, got none"),
    "no profile": (edit(lambda m: m.update(profiles=[])), "profiles: expected array of at least 1 of"),
    "no frames": (edit(lambda m: m["profiles"][0].update(frames=0)), "0.frames: expected integer from 1 to"),
    "a text for a number": (edit(lambda m: m["model"].update(rho="7")), "rho: expected number from 0.1"),
    "a missing tensor": (edit(without_guidance), "guidance float32 [1,3] -> denoised"),
    "a missing network": (edit(without_encoder), "network vae_encoder-b1-32x48 of bundle"),
    "a conditioning of another model": (
        conditioned(lambda fields: fields.pop(0)),
        "expected fps, motion_bucket_id, noise_aug_strength, got motion_bucket_id, noise_aug_strength",
    ),
    "an offset that is none of SVD's": (
        conditioned(lambda fields: fields[0].update(offset=0.0)), "got fps (per video, offset 0.0), motion"
    ),
    "a scale that is none of SVD's": (
        conditioned(lambda fields: fields[1].update(scale=2.0)), "motion_bucket_id (per video, offset 0.0)"
    ),
    "numbers per frame": (
        conditioned(lambda fields: fields[2].update(per="frame")), "noise_aug_strength (per frame, offset"
    ),
    "no conditioning": (drop("model", "architecture", "conditioning"), "key 'conditioning' not found"),
    "a file not listed": (drop("files", "denoiser.bin"), "denoiser.bin without one"),
    "a missing file": (lambda b: (b / "denoiser.bin").unlink(), "got no such file"),
    "a file cut off": (cut, "file denoiser.bin of bundle"),
    "a link": (linked, "got a link"),
    "a path outside": (
        edit(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}})),
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


@pytest.mark.parametrize("name", hostile_manifests.HOSTILE)
def test_a_hostile_manifest_is_refused_as_in_python(
    generate: Generate, tiny_bundle: Path, tmp_path: Path, name: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    bundle = damage.copy(tiny_bundle, tmp_path)
    hostile_manifests.HOSTILE[name](bundle)
    refused(generate.video(bundle, work / "out.y4m", "--steps", 1), 1, str(bundle), work, set())
