"""NVIDIA's own compiler builds here, without a GPU: `svd-export tensorrt --flavour tensorrt-rtx`, for real.

Each build runs in a process of its own, for Polygraphy serves one flavour a process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest
import torch

from svd_engine import info
from svd_engine.bundle.flavours import TENSORRT_RTX, sm
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import unet_levels, vae_levels
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.install import install_line
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import feature_of, reusing_specs
from svd_engine.spec.streaming import streaming_of
from svd_engine.spec.tables import denoiser, segments
from svd_export.cli import main
from svd_export.compiled import compile_graph, parse_errors
from svd_export.graph_check import check_graph
from svd_export.to_onnx import export_network
from svd_export.weights import WeightsFile
from tests.export.conftest import NETWORKS, plans
from tests.support import damage
from tests.support.commands import call, start

pytestmark = [
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx-cu13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="these hold what happens without a GPU"),
]


def build(folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    process = start("svd-export", "tensorrt", folder, "--flavour", "tensorrt-rtx", *arguments)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("target", "options"), [("sm75", ()), ("sm120", ("--stream-weights",)), ("portable", ())]
)
def test_the_demo_builds_for(
    demo_half_bundle: Path, tmp_path: Path, target: str, options: tuple[str, ...]
) -> None:
    """Four networks, whole and listed, with what the compiler says of their memory; nothing is loaded."""
    folder = damage.copy(demo_half_bundle, tmp_path)
    code, out, err = build(folder, "--target", target, *options)
    assert code == 0, err
    rows = plans(folder)
    assert tuple(rows) == NETWORKS
    Bundle(folder).check_hashes()
    for row in rows.values():
        assert (row.flavour, row.target.label) == ("tensorrt-rtx", target)
        assert row.device_memory_bytes > 0
        assert row.compiled is not None
        assert row.compiled.kernels > 10
        assert row.compiled.activation_bytes == row.device_memory_bytes
        assert min(row.compiled.read_bytes, row.compiled.written_bytes, row.compiled.weights_bytes) > 0
        assert (row.workspace_bytes, row.optimization_level, row.stripped) == (None, None, False)
        streams = row.least_weight_bytes is not None
        assert streams is bool(options)
        assert not streams or 0 < row.least_weight_bytes < row.compiled.weights_bytes
    cards = {sm(capability) for capability in rows["denoiser"].target.capabilities}
    assert cards == ({"sm86", "sm89", "sm120"} if target == "portable" else {target})
    assert f"(asked for), for {rows['denoiser'].target.cards}" in err
    assert "on two quiet CPU cores and" in err
    assert "GiB of memory" in out
    facts = info.plan_facts(Bundle(folder))
    assert all("MiB of weights and" in fact and " kernels that move " in fact for fact in facts.values())
    assert all("torch sees no CUDA GPU" in fact for fact in facts.values())
    assert not list(folder.glob(".*"))


def test_one_plan_for_several_cards_and_the_same_bytes_every_time(folder: Path) -> None:
    arguments = ("--target", "sm120,sm86", "--networks", "vae_decoder")
    code, _, err = build(folder, *arguments)
    assert code == 0, err
    (row,) = plans(folder).values()
    assert ".trtrtx" in row.file
    assert row.file.endswith("-sm86-sm120-float16.plan")
    sha256 = Bundle(folder).manifest.files[row.file].sha256
    _, _, err = build(folder, *arguments)
    assert f"{row.file} is there already" in err
    damage.flip(folder / row.file)
    code, _, err = build(folder, *arguments)
    assert code == 0, err
    assert Bundle(folder).manifest.files[row.file].sha256 == sha256


def test_a_graph_that_it_refuses(folder: Path) -> None:
    """The parser's own words, and the bundle as it was."""
    name = damage.network(folder, "denoiser")["graphs"]["tensorrt"]
    model = onnx.load(folder / name, load_external_data=False)
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    attention.attribute.append(onnx.helper.make_attribute("softmax_precision", onnx.TensorProto.FLOAT))
    (folder / name).write_bytes(model.SerializeToString())
    damage.trust(folder, name)
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    code, _, err = build(folder, "--target", "sm89", "--networks", "denoiser")
    assert code == 1
    assert "a graph that TensorRT's parser takes, got" in err
    assert "softmax precision" in err
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == before


def test_denoisers_that_reuse(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Both graphs are taken as they are, for Turing too, and the shallow one is the smaller engine."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    plain = denoiser(
        Profile(2, 32, 16, 1, "single", 2), checkpoint.model.architecture, Precision.of("float16")
    )
    specs = reusing_specs(plain, feature_of(*unet_levels(checkpoint.configs), 0))
    modules = Modules(checkpoint, rewrites=rewrites_for("onnxruntime", "cuda"))
    with WeightsFile(tmp_path / "denoiser.bin") as weights:
        graphs = [
            tmp_path / export_network(modules, s, weights, ["tensorrt"]).graphs["tensorrt"] for s in specs
        ]
    for graph in graphs:
        assert check_graph(graph, "11", "sm75").findings == ()
        assert parse_errors(graph) == ()
    full, shallow = (compile_graph(graph, "sm75") for graph in graphs)
    assert shallow.total.kernels < 0.7 * full.total.kernels
    assert shallow.weights_bytes < full.weights_bytes / 2


def test_segments_of_a_streamed_decoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Each kind of them, for Turing and a later card."""
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    chain = segments(
        Profile(3, 32, 48, decode_chunk=3), checkpoint.model.architecture, Precision.of("float16"),
        streaming_of(*vae_levels(checkpoint.configs), slice_frames=2),
    )  # fmt: skip
    kinds = (*chain[:4], *chain[-2:])  # head, front, moments, a layer, the last layer, finish
    modules = Modules(checkpoint, rewrites=rewrites_for("onnxruntime", "cuda"))
    with WeightsFile(tmp_path / "vae_decoder.bin") as weights:
        graphs = [
            tmp_path / export_network(modules, s, weights, ["tensorrt"]).graphs["tensorrt"] for s in kinds
        ]
    for graph in graphs:
        for target in ("sm75", "sm89"):
            assert check_graph(graph, "11", target).findings == ()
            assert compile_graph(graph, target).total.kernels > 0


def until_building(process: subprocess.Popen[str], network: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if f"{network}-" in line and ": building" in line:
            return
    raise AssertionError("it ended")


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_stopped_while_it_builds(folder: Path, signal_: signal.Signals) -> None:
    """What is finished stays, what was begun is no trace, and the same command goes on."""
    command = ("svd-export", "tensorrt", folder, "--flavour", "tensorrt-rtx", "--target", "sm89")
    process = start(*command)
    until_building(process, "denoiser")
    process.send_signal(signal_)
    process.communicate(timeout=100)
    assert process.returncode != 0
    Bundle(folder).check_hashes()
    assert tuple(plans(folder)) == ("image_encoder", "vae_encoder")
    code, _, err = build(folder, "--target", "sm89")
    assert code == 0, err
    assert err.count("is there already") == 2
    assert tuple(plans(folder)) == NETWORKS
    assert not list(folder.glob(".*"))


def test_two_builds_at_once(folder: Path) -> None:
    first = start("svd-export", "tensorrt", folder, "--flavour", "tensorrt-rtx", "--target", "sm89")
    until_building(first, "image_encoder")
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as the other needs
    code, _, err = build(folder, "--target", "sm86")
    first.send_signal(signal.SIGCONT)
    _, said = first.communicate(timeout=300)
    assert code == 1
    assert "another process that is writing it now" in err
    assert first.returncode == 0, said
    assert tuple(plans(folder)) == NETWORKS


def test_the_disk_is_full(folder: Path) -> None:
    """Files may grow to 200 kB, and a plan is larger."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from svd_export.cli import main; main()"
    )
    arguments = ["tensorrt", str(folder), "--flavour", "tensorrt-rtx", "--networks", "denoiser"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"writing {folder}: expected room and permission" in done.stderr
    assert plans(folder) == {}
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--target", "here"), 1, "Name the cards instead: --target sm86,sm89,sm120, or --target portable."),
        (("--target", "sm90"), 2, "run --flavour tensorrt, built on such a card"),
        (("--stream-weights", "--stripped"), 2, "stripped with TensorRT for RTX: expected it to be left out"),
        (("--flavour", "tensorrt"), 1, f"Run: {install_line('tensorrt')}"),
    ],
)
def test_wrong_arguments(
    folder: Path, arguments: tuple[str, ...], code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ("--flavour", "tensorrt") and find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    assert call(main, "tensorrt", folder, "--flavour", "tensorrt-rtx", *arguments) == code
    assert part in capsys.readouterr().err
    assert plans(folder) == {}


def test_every_target_has_a_name_in_the_compiler() -> None:
    script = "import json, tensorrt_rtx as t; print(json.dumps(list(t.ComputeCapability.__members__)))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert {sm(capability).upper() for capability in TENSORRT_RTX.targets} | {"NONE", "CURRENT"} == set(
        json.loads(said)
    )
