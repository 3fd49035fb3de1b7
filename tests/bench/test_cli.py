"""`svd-bench run`, `ladder` and `gpu-check` as users call them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svd_bench import cli
from svd_bench.contest import runs as running
from svd_bench.documents.results import Results, read_results
from svd_bench.measuring.memory import Peaks
from svd_engine.bundle.reading import Bundle
from tests.bench.fakes import CEILING
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import damage, stability_file
from tests.support.commands import call

ON_CPU = ("--device", "cpu")
DEMO = ("--checkpoint", "demo", *ON_CPU)
SIZE = ("--frames", FRAMES, "--height", HEIGHT, "--width", WIDTH)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "measure_ceiling", lambda *_: CEILING)


def document(printed: str) -> Results:
    return Results.model_validate_json(printed.strip().splitlines()[-1])


def test_a_run_over_a_bundle(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "peaks_in_child", lambda case: Peaks(host=5))
    code = call(
        cli.main, "run", "--bundle", tiny_bundle, "--backends", "onnxruntime",
        "--stages", "vae_decoder,sampler", *ON_CPU, "--repeat", 1, "--out", tmp_path / "new",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0
    results = document(printed.out)
    assert results == read_results(tmp_path / "new" / "run.json")
    assert results.environment.command.endswith("--device cpu --repeat 1 --out new")
    decoders = [row for row in results.rows if row.stage == "vae_decoder"]
    assert [(row.subject, row.backend, row.peak_host_bytes) for row in decoders] == [
        ("diffusers", "eager", 5), ("svd-engine", "onnxruntime", 5)
    ]  # fmt: skip
    setting = decoders[0].setting
    assert (setting.frames, setting.height, setting.width, setting.decode_chunk) == (
        FRAMES,
        HEIGHT,
        WIDTH,
        CHUNK,
    )
    assert "vae_decoder" in printed.out.splitlines()[-2] or "Share of the limit" in printed.out
    assert "vae_decoder, diffusers eager float32: first call" in printed.err


def test_a_run_exports_what_onnxruntime_needs_and_removes_it(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = call(
        cli.main, "run", "--checkpoint", tiny_checkpoint, "--backends", "onnxruntime", "--peers", "none",
        "--stages", "image_encoder", *SIZE, "--device", "cpu", "--repeat", 1, "--no-memory",
    )  # fmt: skip
    [row] = document(capsys.readouterr().out).rows
    assert (code, row.subject, row.backend, row.of_diffusers) == (0, "svd-engine", "onnxruntime", None)
    assert row.setting.decode_chunk == FRAMES
    assert list(tmp_path.iterdir()) == []


def test_every_dtype_of_a_ladder_has_its_ceiling(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(running, "measure_ceiling", lambda _, dtypes, __: asked.extend(dtypes) or CEILING)
    code = call(
        cli.main, "ladder", "--checkpoint", tiny_checkpoint, "--networks", "vae_decoder",
        "--backends", "eager", "--rungs", "ends", *SIZE, *ON_CPU, "--repeat", 1, "--no-memory",
        "--dtype", "bf16", "--peer-dtype", "fp32",
    )  # fmt: skip
    assert (code, asked) == (0, ["bfloat16", "float32", "float32"])
    theirs, ours = document(capsys.readouterr().out).rows
    assert (theirs.dtype, ours.dtype) == ("float32", "bfloat16")


def test_a_ladder(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = call(
        cli.main, "ladder", "--checkpoint", tiny_checkpoint, "--networks", "vae_decoder",
        "--backends", "eager", "--rungs", "ends", *SIZE, *ON_CPU, "--repeat", 1, "--no-memory",
        "--out", tmp_path,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert document(printed) == read_results(tmp_path / "ladder.json")
    assert "as published" in printed
    assert "all rewrites" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "pass one of --bundle, --checkpoint and --random-weights"),
        (("run", "--checkpoint", "demo", "--random-weights", "svd"), "pass one of"),
        (("run", "--bundle", "b", "--dtype", "fp16"), "a bundle has its own"),
        (("run", "--checkpoint", "demo", "--repeat", "0"), "--repeat"),
        (("ladder",), "pass either --checkpoint or"),
        (("run", *DEMO, "--backends", "eager,trt"), "got 'trt'"),
        (("run", *DEMO, "--stages", "unet"), "stage: expected image_encoder"),
        (("run", *DEMO, "--height", "100"), "a multiple of"),
        (("run", *DEMO, "--peers", "oneflow"), "peer: expected diffusers"),
        (("ladder", *DEMO, "--networks", "vae"), "network: expected unet"),
        (("ladder", *DEMO, "--backends", "tensorrt"), "compiled, onnxruntime, got 'tensorrt'"),
        (("gpu-check", "--out", "OUT", *ON_CPU, "--only", "everything"), "stage: expected environment"),
    ],
)  # fmt: skip
def test_wrong_usage(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = call(cli.main, *(str(tmp_path / "out") if a == "OUT" else a for a in arguments))
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_another_checkpoint_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["source"]["digest"] = "0" * 64
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert call(cli.main, "run", "--bundle", bundle, "--device", "cpu") == 1
    assert f"expected the one that the bundle was made from, digest {'0' * 64}" in capsys.readouterr().err


def test_a_bundle_of_several_videos_a_call_is_refused(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Bundle(tiny_bundle).manifest.profiles[0]
    monkeypatch.setattr(Bundle, "profile_for", lambda *_, **__: replace(own, batch=2))
    assert call(cli.main, "run", "--bundle", tiny_bundle, *ON_CPU) == 2
    assert "expected batch 1, one video a call, got batch 2. Export one" in capsys.readouterr().err


def test_a_run_without_guidance(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a bundle the profile must be of single guidance: a batched one does both halves all the same."""
    run = (
        "run", "--bundle", tiny_bundle, "--without-guidance", "--backends", "onnxruntime",
        "--stages", "denoiser_step", *ON_CPU, "--repeat", 1, "--no-memory",
    )  # fmt: skip
    assert call(cli.main, *run) == 0
    printed = capsys.readouterr().out
    assert {row.setting.guidance for row in document(printed).rows} == {"none"}
    own = replace(Bundle(tiny_bundle).manifest.profiles[0], guidance="batched")
    monkeypatch.setattr(Bundle, "profile_for", lambda *_, **__: own)
    assert call(cli.main, *run) == 2
    assert "got batched guidance. Export one with --guidance single." in capsys.readouterr().err


def test_help_costs_no_torch() -> None:
    """Neither the command nor its help imports what takes seconds."""
    heavy = "{'torch', 'diffusers', 'transformers', 'onnxruntime', 'onnx', 'av'}"
    program = f"""
import sys
from svd_bench.cli import app
try:
    app(["run", "--help"])
except SystemExit:
    pass
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--random-weights" in done.stdout


def test_the_commands_that_read_results_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli.main, "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("run", "ladder", "gpu-check", "tiers", "report", "compare"))


# Single files


@pytest.fixture(scope="module")
def single_file(stability_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stability_file.write(tmp_path_factory.mktemp("single") / "svd.safetensors", stability_pipeline)


def test_a_run_and_a_ladder_over_a_single_file(single_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--checkpoint", single_file, *ON_CPU, *SIZE, "--repeat", 1, "--no-memory")
    assert call(cli.main, "run", *common, "--stages", "image_encoder", "--backends", "eager") == 0
    assert {row.subject for row in document(capsys.readouterr().out).rows} == {"diffusers", "svd-engine"}
    only = ("--networks", "vae_decoder", "--backends", "eager", "--rungs", "ends")
    assert call(cli.main, "ladder", *common, *only) == 0
    results = document(capsys.readouterr().out)
    assert results.environment.command.startswith("svd-bench ladder")


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("ladder",),
        ("quality",),
        ("quality", "--samplers"),
        ("quality", "--reuse"),
    ],
)
def test_a_file_whose_name_hides_its_frames(
    single_file: Path, tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents name a checkpoint by its source alone: every command says how to make a folder of it."""
    file = tmp_path / "mine.safetensors"
    file.symlink_to(single_file)
    assert call(cli.main, *command, "--checkpoint", file) == 2
    assert f"Run: svd-export convert {file} -o FOLDER --frames FRAMES" in capsys.readouterr().err


def test_a_bundle_with_lora(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    lora = {"file": "a.safetensors", "scale": 0.5, "bytes": 1, "sha256": "0" * 64, "fused": 1, "left": 0}
    damage.edit(folder, lambda m: m["source"].update(lora=[lora]))
    assert call(cli.main, "run", "--bundle", folder, *ON_CPU) == 1
    assert "--lora a.safetensors:0.5 -o FOLDER" in capsys.readouterr().err
