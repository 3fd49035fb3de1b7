"""`svd-export tensorrt` over the recording double: every way in which it fails, and what is left then."""

from __future__ import annotations

import _thread
import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, BundleError, ExportError, SettingsError
from svd_engine.install import install_line
from svd_export.cli import main
from svd_export.tensorrt_builder import BuildOptions
from svd_export.to_tensorrt import build_plans
from tests.export.conftest import NETWORKS, built, plans
from tests.support import damage, tensorrt_builder_double
from tests.support.commands import call
from tests.support.tensorrt_double import Fault


def test_an_interrupt_keeps_what_is_finished(trt: Any, folder: Path) -> None:
    """Ctrl-C reaches the main thread while another one builds; the builder ends at its next step."""

    def phases(monitor: Any) -> bool:
        if not trt.called("OnnxParser.parse_from_file")[-1][0].startswith("denoiser"):
            return tensorrt_builder_double.two_phases(monitor)
        _thread.interrupt_main()
        monitor.phase_start("Building", None, 1000)
        for step in range(1000):
            if not monitor.step_complete("Building", step):
                return False
            time.sleep(0.01)
        raise AssertionError("it was not stopped")

    trt.phases = phases
    with pytest.raises(KeyboardInterrupt):
        build_plans(Bundle(folder))
    assert tuple(plans(folder)) == ("image_encoder", "vae_encoder")
    assert not list(folder.glob(".*"))
    trt.phases = tensorrt_builder_double.two_phases
    build_plans(Bundle(folder))
    assert tuple(plans(folder)) == NETWORKS
    assert len(built(trt)) == 4  # none of them twice


def test_the_command_says_how_an_interrupted_build_goes_on(
    trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("svd_export.to_tensorrt.build", interrupted)
    assert call(main, "tensorrt", folder) == 130
    assert "interrupted; finished plans are kept; run the same command to resume" in capsys.readouterr().err


def test_progress_that_cannot_be_said_ends_the_build(
    trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe, say: it is raised behind the builder, and not through it."""

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("svd_export.tensorrt_progress.BuildProgress.step", broken)
    assert "Broken pipe" in fails(folder)


def fails(folder: Path, kind: type[Exception] = ExportError, **more: Any) -> str:
    """The message of a build that fails, and leaves the bundle as it was."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(kind) as caught:
        build_plans(Bundle(folder), networks=["denoiser"], **more)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    return str(caught.value)


def test_an_operator_that_the_parser_does_not_take(trt: Any, folder: Path) -> None:
    trt.unknown = {"Attention"}
    message = fails(folder)
    assert (
        "expected a graph that TensorRT's parser takes, got No importer registered for Attention" in message
    )
    assert "`svd-export check` names what TensorRT does not take" in message


def test_a_parser_that_fails_without_a_word(trt: Any, folder: Path) -> None:
    trt.faults["OnnxParser.parse_from_file"] = Fault(returns=False, says="a file it cannot read")
    assert "got a file it cannot read" in fails(folder)


@pytest.mark.parametrize(
    ("says", "remedy"),
    [
        (
            "[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (no further information)",
            "smaller workspace",
        ),
        (
            "Requested amount of GPU memory is too large: out of memory",
            "single guidance",
        ),
        ("Could not find any implementation for node {ForeignNode[a...b]}", "Use a larger workspace"),
        ("something else", "svd-export check"),
    ],
)
def test_no_plan(trt: Any, folder: Path, says: str, remedy: str) -> None:
    trt.faults["Builder.build_serialized_network"] = Fault(returns=None, says=says)
    message = fails(folder)
    assert f"expected a plan, got {says}. " in message
    assert remedy in message


def test_a_plan_that_does_not_load(trt: Any, folder: Path) -> None:
    trt.faults["Runtime.deserialize_cuda_engine"] = Fault(returns=None, says="bad magic")
    assert "expected a plan that TensorRT can load, got bad magic" in fails(folder)


def test_a_gpu_that_tensorrt_cannot_use(trt: Any, folder: Path) -> None:
    trt.faults["Builder.__init__"] = Fault(returns=None, says="CUDA initialization failure with error: 35")
    message = fails(folder, BackendUnavailable)
    assert "expected a GPU and a driver that it can use, got CUDA initialization failure" in message
    assert "nvidia-smi" in message


def test_no_gpu(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    message = fails(folder, BackendUnavailable)
    assert "target here of TensorRT: expected a CUDA GPU of the kind that will run the plans" in message
    assert "run the same command there" in message


def test_no_tensorrt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    assert call(main, "tensorrt", folder) == 1
    said = capsys.readouterr().err
    assert "expected TensorRT, or TensorRT for RTX, got neither" in said
    assert f"{install_line('tensorrt')} (TensorRT)" in said
    assert f"{install_line('tensorrt-rtx')} (TensorRT for RTX)" in said


def test_no_polygraphy(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    message = fails(folder, BackendUnavailable)
    assert "expected the package polygraphy, got none installed. Run: pip install" in message


def test_one_process_builds_for_one_flavour(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygraphy reads its switch when it is imported."""
    build_plans(Bundle(folder), networks=["vae_encoder"])
    monkeypatch.setattr("polygraphy.config.USE_TENSORRT_RTX", True)
    message = fails(folder, BackendUnavailable)
    assert "expected one flavour of TensorRT in a process" in message
    assert "each flavour in a process of its own" in message


def test_a_network_that_is_none(trt: Any, folder: Path) -> None:
    with pytest.raises(SettingsError, match="network: expected image_encoder, vae_encoder, denoiser"):
        build_plans(Bundle(folder), networks=["unet"])


def test_a_damaged_graph_is_not_built(trt: Any, folder: Path) -> None:
    damage.flip(folder / damage.network(folder, "denoiser")["weights"])
    with pytest.raises(Exception, match=r"file denoiser\.bin"):
        build_plans(Bundle(folder), networks=["denoiser"])
    assert built(trt) == []


def test_the_disk_is_full(trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = fails(folder)
    assert f"writing {folder}: expected room and permission" in message
    assert "Free space, or make the folder writable." in message


@pytest.mark.parametrize("moment", ["move", "second manifest"])
def test_killed_while_a_plan_is_replaced(
    trt: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """At no moment does the manifest list a plan that is not the one in the folder."""
    build_plans(Bundle(folder))
    real, moves = Path.replace, []

    def replace(path: Path, target: Path) -> Any:
        moves.append(path.name)
        if moment == "move" and path.suffix == ".plan":
            raise KeyboardInterrupt
        done = real(path, target)
        if moment == "second manifest" and path.suffix == ".plan":
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        build_plans(Bundle(folder), BuildOptions(stripped=True), ["denoiser"])
    monkeypatch.setattr(Path, "replace", real)
    assert any(name.endswith(".plan") for name in moves)
    Bundle(folder).check_hashes()
    assert "denoiser" not in plans(folder)
    build_plans(Bundle(folder))
    assert set(plans(folder)) == set(NETWORKS)


def test_two_at_once(trt: Any, folder: Path) -> None:
    """The second is refused while the first builds, and takes nothing away from it."""
    seen = []

    def phases(monitor: Any) -> bool:
        with pytest.raises(ExportError, match="another process that is writing it now") as caught:
            build_plans(Bundle(folder), networks=["vae_decoder"])
        seen.append(str(caught.value))
        return True

    trt.phases = phases
    build_plans(Bundle(folder), networks=["denoiser"])
    assert "Wait for it, then run the same command." in seen[0]
    assert tuple(plans(folder)) == ("denoiser",)


def test_a_float32_bundle_is_refused_before_anything_is_built(trt: Any, tiny_bundle: Path) -> None:
    with pytest.raises(
        BundleError, match=r"expected graphs for TensorRT, .* Run: svd-export onnx .* --dtype fp16"
    ):
        build_plans(Bundle(tiny_bundle))
    assert built(trt) == []
