"""`svd-export` as a user meets it: what it passes on, what it refuses, with which exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import __version__
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.spec.profile import Profile
from svd_export.cli import main, profiles
from tests.support import damage
from tests.support.commands import call


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with `code`; gives its message, and holds that nothing was written."""

    def run(*arguments: object, code: int) -> str:
        before = sorted(tmp_path.rglob("*"))
        exited = call(main, *arguments)
        message = capsys.readouterr().err
        assert exited == code, message
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in message
        return " ".join(message.split())

    return run


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> list[Any]:
    """The arguments of each export, which is not done."""
    calls: list[Any] = []

    def export(*arguments: Any) -> Any:
        calls.append(arguments)
        return Bundle(tiny_bundle).manifest.model_copy(update={"model": arguments[0].model})

    monkeypatch.setattr("svd_export.to_onnx.export_bundle", export)
    return calls


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_what_an_export_is_asked_for(
    exported: list[Any], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(
        main, "onnx", tiny_checkpoint, "-o", tmp_path / "new", "--frames", 3, "--frames", 2, "--height", 32,
        "--width", 48, "--batch", 2, "--guidance", "batched", "--guidance", "single", "--decode-chunk", 2,
        "--dtype", "bf16", "--without-rewrite", "fused-qkv",
    )  # fmt: skip
    assert code == 0
    ((checkpoint, folder, wanted, dtype, without, *_),) = exported
    assert checkpoint.source == str(tiny_checkpoint)
    assert (folder, dtype, list(without)) == (tmp_path / "new", torch.bfloat16, ["fused-qkv"])
    assert wanted == [Profile(f, 32, 48, 2, g, 2) for f in (3, 2) for g in ("batched", "single")]
    assert f"wrote {tmp_path / 'new'}: 6 networks, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "dtype", "frames", "size", "random"),
    [
        (("demo",), torch.float32, None, None, False),
        (("--random-weights", "svd"), torch.float16, 14, (576, 1024), True),
        (("--random-weights", "svd-xt"), torch.float16, 25, (576, 1024), True),
        (("TINY", "--height", "32", "--width", "32"), torch.float16, 14, (32, 32), False),
    ],
)
def test_defaults_are_the_checkpoint_s_own(
    exported: list[Any],
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    dtype: torch.dtype,
    frames: int | None,
    size: tuple[int, int] | None,
    random: bool,
) -> None:
    named = (str(tiny_checkpoint) if a == "TINY" else a for a in arguments)
    assert call(main, "onnx", *named, "-o", tmp_path / "new") == 0
    ((checkpoint, _, (profile,), used, without, _, reuse_branch, stream_decoder),) = exported
    assert reuse_branch is None
    assert stream_decoder is None
    model = checkpoint.model
    assert used is dtype
    assert list(without) == []
    assert profile.frames == profile.decode_chunk == (frames or model.frames)
    assert (profile.height, profile.width) == (size or (model.height, model.width))
    assert (profile.batch, profile.guidance) == (1, "batched")
    assert ("the videos mean nothing" in capsys.readouterr().out) is random


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ((), 2, "pass either CHECKPOINT or --random-weights FAMILY"),
        (("demo", "--random-weights", "svd"), 2, "pass either CHECKPOINT or --random-weights FAMILY"),
        (("--random-weights", "sdxl"), 2, "'sdxl' is not one of"),
        (("demo", "--dtype", "int8"), 2, "'int8' is not one of"),
        (("demo", "--form", "operators"), 2, "No such option: --form"),
        (("demo", "--frames", "0"), 2, "num_frames: expected a whole number of at least 1, got 0"),
        (("demo", "--frames", "2", "--frames", "-1"), 2, "num_frames: expected a whole number of at least 1"),
        (("demo", "--height", "0"), 2, "height: expected a whole number of at least 1, got 0"),
        (("demo", "--width", "1001"), 2, "width: expected a multiple of "),
        (("demo", "--batch", "0"), 2, "batch: expected a whole number of at least 1, got 0"),
        (("demo", "--decode-chunk", "0"), 2, "decode_chunk_size: expected a whole number of at least 1"),
        (
            ("svdd",),
            1,
            "checkpoint 'svdd': expected svd, svd-xt, svd-xt-1-1, demo, a folder, a single file, or a hub id",
        ),
        (("./nothing",), 1, "got no such folder"),
        (("demo", "--without-rewrite", "nothing"), 2, "rewrite nothing: expected one of "),
    ],
)
def test_bad_input(
    refused: Callable[..., str], tmp_path: Path, arguments: tuple[str, ...], code: int, parts: str
) -> None:
    assert parts in refused("onnx", *arguments, "-o", tmp_path / "new", code=code)


@pytest.mark.parametrize("spoil", ["no checkpoint", "another family"])
def test_a_folder_that_is_no_svd(
    refused: Callable[..., str], tiny_checkpoint: Path, tmp_path: Path, spoil: str
) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    index = folder / "model_index.json"
    if spoil == "no checkpoint":
        index.unlink()
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    message = refused("onnx", folder, "-o", tmp_path / "new", code=1)
    assert ("FluxPipeline" if spoil == "another family" else "model_index.json") in message


@pytest.mark.parametrize(
    ("output", "parts"),
    [("none/new", "an existing folder to write into"), ("taken", "something that exists already")],
)
def test_outputs_before_the_work_starts(
    refused: Callable[..., str], tmp_path: Path, output: str, parts: str
) -> None:
    """The checkpoint does not exist either; the output is said first."""
    (tmp_path / "taken").mkdir()
    assert parts in refused("onnx", "./nothing", "-o", tmp_path / output, code=1)


def test_profiles_are_made_once_each() -> None:
    made = profiles(open_checkpoint("demo"), [2, 2, 3], 128, 64, 1, ["single", "single"], [8, 2])
    assert made == [Profile(f, 128, 64, 1, "single", chunk) for f, chunk in ((2, 2), (3, 3), (3, 2))]
    with pytest.raises(SettingsError, match="batch"):
        profiles(open_checkpoint("demo"), [2], None, None, -1, ["single"], [None])


def test_verify_finds_the_checkpoint_by_itself(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(tiny_bundle, tmp_path)
    assert call(main, "verify", folder, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    for row in Bundle(folder).manifest.parity:
        assert f"{row.network:<40} max abs {row.max_abs:.2e}" in out
        assert f"] {row.network}" in err
    assert "(allowed 0.0001)" in out


def test_verify_of_random_weights_makes_them_again(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path
) -> None:
    """The tiny bundle claims to be made of svd's; it is refused for its digest, not for the name."""
    folder = damage.copy(tiny_bundle, tmp_path)
    damage.edit(folder, lambda m: m["source"].update(checkpoint="random:svd"))
    message = refused("verify", folder, "--device", "cpu", code=1)
    assert message.startswith("error: checkpoint random:svd: expected the one that")
    assert "Use --checkpoint ORIGINAL" in message


@pytest.mark.parametrize(
    ("spoil", "arguments", "code", "parts"),
    [
        (shutil.rmtree, (), 1, "svd-export onnx CHECKPOINT -o BUNDLE"),
        (lambda folder: damage.flip(folder / "vae_decoder.bin"), (), 1, "file vae_decoder.bin"),
        (lambda folder: None, ("--device", "gpu"), 2, "auto, cpu, cuda or cuda:N"),
        (lambda folder: None, ("--checkpoint", "./moved"), 1, "no such folder"),
        (lambda folder: None, ("--checkpoint", "demo"), 1, "expected the one that"),
    ],
    ids=["no bundle", "byte flipped", "device", "checkpoint moved", "another checkpoint"],
)
def test_verify_refuses(
    refused: Callable[..., str], tiny_bundle: Path, tmp_path: Path,
    spoil: Callable[[Path], Any], arguments: tuple[str, ...], code: int, parts: str,
) -> None:  # fmt: skip
    folder = damage.copy(tiny_bundle, tmp_path)
    spoil(folder)
    assert parts in refused("verify", folder, *arguments, code=code)
