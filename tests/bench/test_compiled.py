"""`svd-bench compiled` and `forms`: the real compiler over a tiny bundle."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svd_bench.cli import main
from svd_bench.compiled.arithmetic import flop_of
from svd_bench.compiled.compile_bundle import candidate
from svd_bench.compiled.compiling import CompileCase, compile_case, compiled_in_child
from svd_bench.compiled.document import (
    CompiledDocument,
    CompiledNetwork,
    KernelGroup,
    changes_table,
    compiled_tables,
    ladder_table,
    networks_table,
    read_compiled,
)
from svd_bench.report import plots
from svd_engine.bundle.manifest import CompiledFigures
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import ExportError, SettingsError
from tests.bench import documents
from tests.support.commands import call
from tests.support.paths import ROOT

HALF = TensorProto.FLOAT16


def network(key: str = "denoiser-b1", kernels: int = 10, gib: int = 3, fused: int = 2) -> CompiledNetwork:
    figures = CompiledFigures(
        kernels=kernels, read_bytes=gib * 2**30, written_bytes=2**30, activation_bytes=2**29, weights_bytes=5
    )
    group = KernelGroup(kernels=kernels, read_bytes=gib * 2**30, written_bytes=2**30)
    return CompiledNetwork(
        network=key, figures=figures, flop=1.5e12, attentions=2, fused_attentions=fused,
        kinds={"gemm": group}, names={"_gemm_mha_v2": group}, seconds=3.0, peak_host_bytes=2**31,
    )  # fmt: skip


def document(*networks: CompiledNetwork) -> CompiledDocument:
    return CompiledDocument(
        environment=documents.environment(), compiler="TensorRT for RTX 1.7", target="sm89", model="svd",
        random_weights=True, dtype="float16", networks=networks,
    )  # fmt: skip


def graph_of(node: onnx.NodeProto, folder: Path, weights: tuple[int, ...], **inputs: tuple[int, ...]) -> Path:
    constants = [numpy_helper.from_array(np.zeros(weights, np.float16), "w")] if weights else []
    taken = [helper.make_tensor_value_info(name, HALF, shape) for name, shape in inputs.items()]
    made = helper.make_tensor_value_info("y", HALF, None)
    graph = helper.make_graph([node], "g", taken, [made], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("node", "weights", "inputs", "flop"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (5, 7), {"x": (2, 3, 5)}, 2 * 2 * 3 * 5 * 7),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (7, 5), {"x": (3, 5)}, 2 * 3 * 5 * 7),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), (5, 7), {"x": (5, 3)}, 2 * 3 * 5 * 7),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1]), (6, 2, 3, 3),
         {"x": (1, 4, 8, 8)}, 2 * 6 * 64 * 2 * 9),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 1, 1]),
         (4, 6, 4, 4), {"x": (1, 4, 8, 8)}, 2 * 4 * 64 * 6 * 16),
        (helper.make_node("Attention", ["q", "k", "v"], ["y"]), (),
         {"q": (1, 2, 5, 16), "k": (1, 2, 7, 16), "v": (1, 2, 7, 16)}, 4 * 2 * 5 * 7 * 16),
        (helper.make_node("Relu", ["x"], ["y"]), (), {"x": (4, 4)}, 0),
    ],
    ids=["product", "gemm", "gemm turned", "convolution in groups", "transposed convolution", "attention",
         "activation"],
)  # fmt: skip
def test_arithmetic(node: Any, weights: Any, inputs: Any, flop: int, tmp_path: Path) -> None:
    assert flop_of(graph_of(node, tmp_path, weights, **inputs)) == flop


def test_arithmetic_without_shapes(tmp_path: Path) -> None:
    path = graph_of(helper.make_node("MatMul", ["x", "w"], ["y"]), tmp_path, (5, 7), x=(3, 5))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, path)
    with pytest.raises(ExportError, match="tensor x: expected a shape that can be inferred"):
        flop_of(path)


def test_a_bundle_and_what_changed(
    tiny_half_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compiled", tiny_half_bundle, "--network", "image_encoder", "--target", "sm86")
    assert call(main, *command, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    made = CompiledDocument.model_validate_json(out.splitlines()[-1])
    assert read_compiled(tmp_path / "out" / "compiled.json") == made
    assert (made.target, made.dtype, made.random_weights) == ("sm86", "float16", False)
    assert made.compiler.startswith("TensorRT for RTX 1.")
    (encoder,) = made.networks
    assert encoder.network == "image_encoder-b1"
    assert (encoder.fused_attentions, encoder.attentions) == (0, 2)  # heads 8 wide
    assert encoder.flop > 0
    assert (
        encoder.flop <= sum(w.kernels * w.flop for w in encoder.work) < 1.2 * encoder.flop
    )  # 3 channels as 8
    assert sum(w.kernels for w in encoder.work) == encoder.figures.kernels
    moved = encoder.figures.read_bytes + encoder.figures.written_bytes
    assert sum(w.kernels * w.bytes for w in encoder.work) == moved
    assert sum(group.kernels for group in encoder.kinds.values()) == encoder.figures.kernels
    assert encoder.peak_host_bytes > 50 * 2**20
    assert "image_encoder-b1" in (tmp_path / "out" / "compiled.svg").read_text()
    assert "0 of 2" in out
    assert call(main, *command, "--against", tmp_path / "out" / "compiled.json", "--markdown") == 0
    out = capsys.readouterr().out
    assert f"| {encoder.figures.kernels} -> {encoder.figures.kernels} |" in out
    assert "(+0.0%)" in out


@pytest.mark.parametrize("name", ["vae_encoder", "denoiser"])
def test_kernels_show_the_arithmetic_of_their_graph(name: str, tiny_half_bundle: Path) -> None:
    """But for products of one row, and with padded channels."""
    bundle = Bundle(tiny_half_bundle)
    spec = next(e.spec for e in bundle.manifest.networks if e.spec.network == name)
    made = compile_case(CompileCase(network=name, graph=bundle.graph(spec, "tensorrt"), target="sm89"))
    assert sum(w.kernels * w.flop for w in made.work) == pytest.approx(made.flop, rel=1e-3)
    assert {w.float32 for w in made.work if w.flop} == {name == "vae_encoder"}


def test_every_form_of_a_graph_is_the_same_function(tiny_half_bundle: Path) -> None:
    """Only what is under test is taken apart."""
    bundle = Bundle(tiny_half_bundle)
    entry = next(e for e in bundle.manifest.networks if e.spec.network == "denoiser")
    seen = {}
    for normalisation in ("operator", "instance, float32", "instance, half"):
        for attention in ("operator", "products"):
            with candidate(bundle, entry, normalisation, attention) as graph:  # type: ignore[arg-type]
                model = onnx.load(graph, load_external_data=False)
            onnx.shape_inference.infer_shapes(model, strict_mode=True)
            operators = [n.op_type for n in model.graph.node]
            seen[normalisation, attention] = operators
            assert ("GroupNormalization" in operators) == (normalisation == "operator")
            assert ("InstanceNormalization" in operators) == (normalisation != "operator")
            assert ("Attention" in operators) == (attention == "operator")
    casts = {form: operators.count("Cast") for form, operators in seen.items()}
    assert casts["instance, float32", "operator"] > casts["instance, half", "operator"]


def test_the_weights_are_there_where_nobody_may_make_a_link(
    tiny_half_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows gives few people that right."""

    def refused(*_: object) -> None:
        raise OSError(22, "A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refused)
    bundle = Bundle(tiny_half_bundle)
    entry = next(e for e in bundle.manifest.networks if e.spec.network == "image_encoder")
    with candidate(bundle, entry, "operator", "operator") as graph:
        assert (graph.parent / entry.weights).read_bytes() == (bundle.folder / entry.weights).read_bytes()


def test_forms(
    tiny_half_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cases: list[CompileCase] = []

    def compiled(case: CompileCase) -> CompiledNetwork:
        assert case.graph.is_file()
        cases.append(case)
        return network(case.network)

    monkeypatch.setattr("svd_bench.compiled.compile_bundle.compiled_in_child", compiled)
    assert call(main, "forms", tiny_half_bundle, "--network", "vae_decoder", "--out", tmp_path) == 0
    assert len(cases) == 3  # three normalisations; it has no attention that is one operator
    assert {case.target for case in cases} == {"sm89"}
    assert len({case.network for case in cases}) == 3
    document = read_compiled(tmp_path / "forms-vae_decoder.json")
    assert [n.network for n in document.networks] == [case.network for case in cases]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(document.model_dump_json())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--target", "sm90"), 2, "target: expected one of sm75, "),
        (("--network", "unet"), 2, "network: expected one of image_encoder"),
    ],
)
def test_wrong_arguments(
    tiny_half_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: Any, code: int, message: str
) -> None:
    for command in ("compiled", "forms"):
        assert call(main, command, tiny_half_bundle, *arguments) == code
        assert message.split(": ")[0] in capsys.readouterr().err


def test_a_bundle_without_graphs_for_tensorrt(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "compiled", tiny_bundle) == 1
    assert "--dtype fp16" in capsys.readouterr().err


def test_what_the_compiler_refuses_is_said(tmp_path: Path) -> None:
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], softcap=1.0)
    graph = graph_of(node, tmp_path, (), **dict.fromkeys("qkv", (1, 1, 8, 16)))
    with pytest.raises(ExportError, match=r"network n for sm89: .*softcap is not supported"):
        compiled_in_child(CompileCase(network="n", graph=graph, target="sm89"))


@pytest.mark.parametrize(("code", "words"), [(-9, "killed, as when memory runs out"), (3, "exit code 3")])
def test_a_compiler_that_dies(code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = SimpleNamespace(returncode=code, stdin=io.StringIO(), wait=lambda: code, kill=lambda: None)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: ended)
    with pytest.raises(ExportError, match=words):
        compiled_in_child(CompileCase(network="n", graph=tmp_path, target="sm89"))


def test_an_interrupt_ends_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[subprocess.Popen[str]] = []

    class Interrupted(subprocess.Popen[str]):
        def wait(self, timeout: float | None = None) -> int:
            children.append(self)
            if len(children) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled_in_child(CompileCase(network="n", graph=tmp_path, target="sm89"))
    assert children[0].poll() is not None


def test_a_compiler_ends_with_its_parent() -> None:
    """Its stdin closes when the parent is killed."""
    program = (
        "import threading, time; from svd_bench.compiled.compiling import end_with_parent as end; "
        "threading.Thread(target=end, daemon=True).start(); time.sleep(100)"
    )
    ended = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, timeout=90, check=False)
    assert ended.returncode == 1


@pytest.mark.parametrize("bad", ["nothing", "text", "others"])
def test_a_bad_comparison_is_refused_before_compiling(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setattr(
        "svd_bench.compiled.compile_bundle.compiled_in_child", lambda case: pytest.fail("compiled")
    )
    if bad != "nothing":
        text = "{}" if bad == "text" else document(network("other")).model_dump_json()
        (tmp_path / bad).write_text(text)
    assert call(main, "compiled", tiny_half_bundle, "--against", tmp_path / bad) in (1, 2)


def test_changes() -> None:
    before = document(network(kernels=20, gib=7), network("vae_decoder-t2"))
    table = changes_table(before, document(network(kernels=10, gib=3)))
    assert [list(row) for row in table.rows] == [
        ["denoiser-b1", "20 -> 10", "8.0 GiB -> 4.0 GiB (-50.0%)", "0.5 GiB -> 0.5 GiB", "2 -> 2 of 2"]
    ]
    with pytest.raises(SettingsError, match=r"networks to compare: expected one of denoiser-b1, .*got other"):
        changes_table(before, document(network("other")))


def test_tables_and_plot() -> None:
    made = document(network(), network("vae_encoder-b1", fused=0))
    first, *largest = compiled_tables(made)
    assert first.title == "svd, random weights, float16, sm89, TensorRT for RTX 1.7: one call"
    assert list(first.rows[1])[:6] == ["vae_encoder-b1", "10", "3.0 GiB", "1.0 GiB", "1.5", "0 of 2"]
    assert [table.title for table in largest] == ["denoiser-b1", "vae_encoder-b1"]
    assert list(largest[0].rows[0]) == ["kind", "gemm", "10", "3.0 GiB", "1.0 GiB", "100.0%"]
    assert plots.compiled(made) == plots.compiled(made)


@pytest.mark.parametrize("content", [b"{}", b"no JSON", None])
def test_a_file_that_is_no_document(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="that `svd-bench compiled` wrote, or a bundle"):
        read_compiled(path)


def test_the_child_needs_no_gpu_and_prints_one_document(tiny_half_bundle: Path) -> None:
    bundle = Bundle(tiny_half_bundle)
    graph = bundle.graph(bundle.manifest.networks[0].spec, "tensorrt")
    case = CompileCase(network="n", graph=graph, target="sm89")
    assert compiled_in_child(case).network == "n"


RESULTS = ROOT / "benchmarks" / "svd_bench" / "results" / "compiled"
# docs/benchmarks.md: svd-bench compiled BUNDLE; docs/tensorrt.md: svd-bench forms BUNDLE --network NETWORK;
# docs/reuse.md has its command
PAGES = {
    "docs/benchmarks.md": "sv*.json",
    "docs/tensorrt.md": "forms-*.json",
    "docs/reuse.md": "reuse-*.json",
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_show_the_documents(page: str) -> None:
    text = (ROOT / page).read_text()
    shown = [networks_table(read_compiled(path)) for path in sorted(RESULTS.glob(PAGES[page]))]
    assert shown
    assert all(table.markdown().strip() in text for table in shown)


def test_the_page_shows_the_ladder() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    rungs = [ladder_table(read_compiled(path)) for path in sorted(RESULTS.glob("ladder-*.json"))]
    assert rungs
    assert all(table.markdown().strip() in text for table in rungs)


def test_the_readme_shows_the_denoisers_ladder() -> None:
    """Its rungs, kernels, traffic and activations."""
    whole = ladder_table(read_compiled(RESULTS / "ladder-denoiser.json"))
    header, *rows = ([line[i] for i in (1, 2, 3, 5)] for line in (whole.header, *whole.rows))
    short = replace(whole, header=header, rows=rows, left=1)
    assert short.markdown().strip() in (ROOT / "README.md").read_text()


def test_the_committed_denoiser_attends_in_fused_kernels() -> None:
    made = {n.network.partition("-")[0]: n for n in read_compiled(RESULTS / "svd-xt-sm89.json").networks}
    assert made.keys() == {"image_encoder", "vae_encoder", "denoiser", "vae_decoder"}
    assert (made["denoiser"].fused_attentions, made["denoiser"].attentions) == (32, 32)
