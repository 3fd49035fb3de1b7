"""What can be known is refused before anything expensive is opened."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svd_bench import cli as bench_cli
from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint import opening as checkpoint
from svd_engine.cli import main as cli
from svd_export import cli as export_cli
from tests.support import damage
from tests.support.commands import call
from tests.support.paths import ROOT

PHOTOGRAPH = ROOT / "engine/svd_engine/assets/coffee.png"


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("opened before the refusal")


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither checkpoints nor bundles."""
    import svd_bench.subjects.cases
    import svd_engine.residency.source

    for module in (checkpoint, svd_engine.residency.source, svd_bench.subjects.cases):
        monkeypatch.setattr(module, "open_checkpoint", never)
    monkeypatch.setattr(svd_engine.residency.source, "Bundle", never)
    monkeypatch.setattr("svd_export.to_onnx.export_bundle", never)


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder refuses new files, as on a read-only disk, which root may not write either."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize("source", ["--checkpoint=demo", "--bundle=./nothing"])
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--steps=0", "num_inference_steps"),
        ("--frames=0", "num_frames"),
        ("--height=0", "height"),
        ("--fps=0", "fps"),
        ("--motion-bucket-id=-1", "motion_bucket_id"),
        ("--noise-aug-strength=-1", "noise_aug_strength"),
        ("--max-guidance-scale=nan", "max_guidance_scale"),
        ("--decode-chunk-size=0", "decode_chunk_size"),
        ("--churn=-1", "churn"),
        ("--rho=0", "rho"),
    ],
)
def test_settings_of_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, option: str, name: str
) -> None:
    assert call(cli.main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.mp4", source, option) == 2
    assert f"error: {name}: expected" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_opens", "read_only")
def test_a_report_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--checkpoint", "demo", "--report", tmp_path / "report.json")
    assert call(cli.main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.mp4", *arguments) == 1
    err = capsys.readouterr().err
    assert "report.json: expected a folder that can be written, got [Errno 30] Read-only file" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("options", "part"),
    [({"dtype": "fp8"}, "dtype"), ({"without_rewrites": ["no-such"]}, "no-such")],
)
def test_arguments_of_a_checkpoint(options: dict[str, Any], part: str) -> None:
    from svd_engine import VideoEngine
    from svd_engine.errors import SettingsError

    with pytest.raises(SettingsError, match=part):
        VideoEngine.from_checkpoint("svd-xt", backend="eager", device="cpu", **options)


@pytest.mark.usefixtures("nothing_opens")
@pytest.mark.parametrize(
    ("arguments", "part", "code"),
    [
        (("run", "--checkpoint", "demo", "--backends", "eager,tensorrt", "--device", "cpu"), "a CUDA GPU", 1),
        (("run", "--checkpoint", "demo", "--backends", "magic"), "backend", 2),
        (("run", "--checkpoint", "demo", "--peers", "magic"), "peer", 2),
        (
            ("run", "--checkpoint", "demo", "--variant", "fp16", "--dtype", "fp16", "--stages", "x"),
            "stage",
            2,
        ),
    ],
)
def test_what_svd_bench_cannot_run(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], part: str, code: int
) -> None:
    assert call(bench_cli.main, *arguments) == code
    assert part in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_opens")
def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call(bench_cli.main, "run", "--checkpoint", "demo", "--backends", "eager,onnxruntime") == 1
    assert "onnxruntime" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_opens", "read_only")
@pytest.mark.parametrize("command", ["run", "ladder", "quality"])
def test_results_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert call(bench_cli.main, command, "--checkpoint", "demo", "--out", tmp_path / "out") == 1
    assert "expected a folder that can be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (cli.main, ("generate", PHOTOGRAPH, "-o", "v.mp4", "--bundle", "b", "--variant", "fp16")),
        (cli.main, ("info", "--variant", "fp16")),
        (cli.main, ("info", "--check")),
        (cli.main, ("info", "bundle", "--checkpoint", "demo")),
        (export_cli.main, ("onnx", "--random-weights", "small", "--variant", "fp16", "-o", "b")),
        (bench_cli.main, ("run", "--random-weights", "small", "--variant", "fp16")),
        (bench_cli.main, ("ladder", "--random-weights", "small", "--variant", "fp16")),
        (bench_cli.main, ("tiers", "--run", "--random-weights", "svd", "--variant", "fp16")),
    ],
)
def test_options_that_do_not_belong_together(main: Callable[[], None], arguments: tuple[Any, ...]) -> None:
    assert call(main, *arguments) == 2


@pytest.mark.usefixtures("read_only")
def test_verify_of_a_read_only_bundle(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    before = (folder / MANIFEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("svd_export.verify.compare", never)
        patch.setattr(checkpoint.Checkpoint, "digest", never)
        assert call(export_cli.main, "verify", folder, "--device", "cpu") == 1
    assert "writable, or use --no-write." in capsys.readouterr().err
    assert call(export_cli.main, "verify", folder, "--device", "cpu", "--no-write") == 0
    assert "max abs" in capsys.readouterr().out
    assert (folder / MANIFEST).read_bytes() == before


def test_info_checks_files_without_a_checkpoint(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    assert call(cli.main, "info", folder, "--check") == 0
    out = capsys.readouterr().out
    assert f"checked         {len(Bundle(folder).manifest.files)} files have the manifest's hashes" in out
    damage.flip(folder / "vae_decoder.bin")
    assert call(cli.main, "info", folder) == 0
    assert call(cli.main, "info", folder, "--check") == 1
    assert "file vae_decoder.bin of bundle" in capsys.readouterr().err


def test_info_of_a_checkpoint_and_of_its_bundle_name_the_files(
    tiny_checkpoint: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = checkpoint.open_checkpoint(tiny_checkpoint)
    (unet,) = opened.weight_files("unet")
    assert unet in Bundle(tiny_bundle).manifest.source.weights
    for arguments in (("--checkpoint", tiny_checkpoint), (tiny_bundle,)):
        assert call(cli.main, "info", *arguments) == 0
        assert f"unet/{unet.file}, {unet.bytes} bytes, sha256 {unet.sha256}" in capsys.readouterr().out
