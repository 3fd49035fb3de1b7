"""`svd-export check`: good bundles fit, and every fault that a graph can have is named."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svd_engine.bundle.reading import Bundle
from svd_export import tensorrt_cli
from svd_export.cli import main
from svd_export.graph_check import GraphReport, check_graph
from svd_export.tensorrt_ops import OPSET_LIMITS, SINCE, TYPES, TensorRTRelease
from tests.export.test_forms import one_node, taken_apart
from tests.support import damage
from tests.support.commands import call

HALF = TensorProto.FLOAT16
SHAPE = (1, 2, 6, 16)


def report(model: onnx.ModelProto, folder: Path, version: TensorRTRelease = "11") -> GraphReport:
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return check_graph(path, version)


def attention(**changes: Any) -> onnx.ModelProto:
    return one_node("Attention", HALF, changes, q=SHAPE, k=SHAPE, v=SHAPE)


def model(
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...] = (1, 4),
    kind: int = TensorProto.FLOAT,
    constants: dict[str, Any] | None = None,
    opset: int = 20,
) -> onnx.ModelProto:
    """From `x` to `y`."""
    values = [helper.make_tensor_value_info(name, kind, shape if name == "x" else None) for name in "xy"]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(op: str, *inputs: str, to: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [to], **attributes)


def test_versions_are_those_of_the_command_and_the_table() -> None:
    assert (
        [v.value for v in tensorrt_cli.VersionOption] == list(get_args(TensorRTRelease)) == list(OPSET_LIMITS)
    )
    assert SINCE.keys() <= TYPES.keys()
    assert set(SINCE.values()) <= OPSET_LIMITS.keys()


def test_a_good_bundle_fits(half_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in half_bundle.iterdir()}
    assert call(main, "check", half_bundle) == 0
    *lines, _asked = capsys.readouterr().out.splitlines()
    keys = [entry.spec.key for entry in Bundle(half_bundle).manifest.networks]
    assert [line.split()[0] for line in lines] == keys
    assert all(" fits: " in line for line in lines)
    assert {path: path.stat().st_mtime_ns for path in half_bundle.iterdir()} == before


def test_it_says_who_answered(
    half_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    assert call(main, "check", half_bundle) == 0
    out = capsys.readouterr().out
    assert f"asked: the parser of TensorRT for RTX {tensorrt_rtx.__version__}, and the table\n" in out
    assert call(main, "check", half_bundle, "--tensorrt", "10.14") == 0
    assert "asked: the table of TensorRT 10.14\n" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert call(main, "check", half_bundle) == 0
    assert "asked: the table of TensorRT 11\n" in capsys.readouterr().out


def test_what_the_parser_refuses_is_a_finding(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The form that TensorRT refused, in the place of the graph that it takes."""
    entry = next(e for e in Bundle(folder).manifest.networks if e.spec.network == "denoiser")
    damage.edit(folder, lambda m: m["networks"][2]["graphs"].update(tensorrt=entry.graphs["onnxruntime"]))
    assert call(main, "check", folder) == 1
    out, err = capsys.readouterr()
    assert "Setting softmax precision is not supported" in out
    assert "has softmax_precision, which TensorRT does not take" in out
    assert "expected graphs without findings, got" in err


def test_a_card_has_rules_of_its_own(
    half_bundle: Path, brain_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, "check", brain_bundle, "--target", "sm75") == 1
    out, err = capsys.readouterr()
    assert "of type BFLOAT16, which TensorRT for RTX does not build for sm75" in out
    assert "Build without sm75" in err
    assert call(main, "check", brain_bundle, "--target", "sm86") == 0
    assert call(main, "check", half_bundle, "--target", "sm75") == 0
    assert call(main, "check", half_bundle, "--target", "sm75", "--tensorrt", "11") == 2
    assert "leave out --tensorrt" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_a_float32_bundle_has_no_graph_for_tensorrt(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, "check", tiny_bundle) == 1
    err = capsys.readouterr().err
    assert "expected graphs for TensorRT, which bundles in half precision hold, got only for ONNX Run" in err
    assert re.search(
        r"svd-export onnx \S+ -o NEW_BUNDLE --frames 3 --height 32 --width 48 --guidance batched "
        r"--guidance single --decode-chunk 2 --dtype fp16",
        err,
    )


def test_attention_is_counted_by_the_width_of_its_heads(half_bundle: Path) -> None:
    """Spatial and temporal, two each; without the rewrite of cross-attention there would be twice as many."""
    folder, found = half_bundle, {}
    for entry in Bundle(folder).manifest.networks:
        nodes = onnx.load(str(folder / entry.graphs["tensorrt"]), load_external_data=False).graph.node
        found[entry.spec.network] = report = check_graph(folder / entry.graphs["tensorrt"], "11")
        assert sum(report.fused.values()) == sum(n.op_type == "Attention" for n in nodes)
        assert sum(report.apart.values()) == sum(n.op_type == "Softmax" for n in nodes)
    assert (found["denoiser"].fused, found["denoiser"].apart) == ({16: 8}, {})
    assert (found["vae_encoder"].fused, found["vae_encoder"].apart) == ({}, {64: 1})  # in float32


@pytest.mark.parametrize("version", ["10.14", "11"])
def test_the_pattern_of_attention(tmp_path: Path, version: TensorRTRelease) -> None:
    for kind in (TensorProto.FLOAT, HALF):  # half precision has casts around its softmax
        apart = taken_apart(one_node("Attention", kind, {}, q=SHAPE, k=SHAPE, v=SHAPE))
        found = report(apart, tmp_path, version)
        assert (found.attentions, found.findings) == ({16: 1}, ())
        assert bool(found.fused) == (kind == HALF)


def products(scaled: str, axis: int = -1, softmax_to: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    """Attention of `x` to itself, taken apart by hand; `scaled`: the queries, the scores, or nothing."""
    queries, scores = ("q" if scaled == "queries" else "x"), ("t" if scaled == "scores" else "s")
    nodes = [
        node("Mul", "x", "factor", to="q"),
        node("Transpose", "x", to="k", perm=[0, 1, 3, 2]),
        node("MatMul", queries, "k", to="s"),
        node("Mul", "s", "factor", to="t"),
        node("Softmax", scores, to="p", axis=axis),
        *(node("MatMul", "p", "x", to=name) for name in softmax_to),
    ]
    return model(nodes, SHAPE, constants={"factor": np.array(0.5, np.float32)})


@pytest.mark.parametrize(
    "bad",
    [products("scores"), products("nothing"), products("queries", axis=2),
     products("queries", softmax_to=("y", "z"))],
    ids=["scale after the product", "no scale", "another axis", "weights that are kept"],
)  # fmt: skip
def test_attention_that_does_not_fuse(bad: onnx.ModelProto, tmp_path: Path) -> None:
    assert report(products("queries"), tmp_path).attentions == {16: 1}
    found = report(bad, tmp_path)
    assert found.attentions == {}
    assert found.findings == ("Softmax p: a softmax between products in a form that is not known here",)


def two_dimensions() -> onnx.ModelProto:
    return one_node("Attention", HALF, {}, q=(6, 8), k=(6, 8), v=(6, 8))


def with_a_past() -> onnx.ModelProto:
    made = attention()
    made.graph.node[0].input.extend(["", "past_k", "past_v"])
    made.graph.input.extend(helper.make_tensor_value_info(n, HALF, SHAPE) for n in ("past_k", "past_v"))
    return made


def two_outputs() -> onnx.ModelProto:
    made = model([node("LayerNormalization", "x", "w")], constants={"w": np.ones(4, np.float32)})
    made.graph.node[0].output.append("mean")
    return made


INDEX = {"i": np.array([1], np.int64)}
BAD: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "unknown operator": (lambda: model([node("Det", "x")], (3, 3)), "Det y: TensorRT 11 has no such"),
    "its own domain": (
        lambda: helper.make_model(
            model([]).graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.x", 1)]
        ),
        "operators of the domain com.x",
    ),
    "opset": (lambda: model([node("Relu", "x")], opset=26), "opset 26, and TensorRT 11 takes 9 to 25"),
    "float64": (lambda: model([node("Exp", "x")], kind=TensorProto.DOUBLE), "Exp y: of type DOUBLE, and"),
    "type of a tensor": (
        lambda: model([node("Exp", "x")], kind=TensorProto.DOUBLE), "tensor x: of type DOUBLE"
    ),
    "type of an operator": (lambda: model([node("Exp", "x")], kind=TensorProto.INT32), "y: of type INT32"),
    "integer arithmetic": (
        lambda: model([node("Shape", "x", to="s"), node("Add", "s", "i", to="t"), node("Expand", "x", "t")],
                      constants=INDEX),
        "tensor t: an integer that is computed (INT64)",
    ),
    "axes that are computed": (
        lambda: model([node("Shape", "x", to="s"), node("ReduceSum", "x", "s")]),
        "ReduceSum y: its input s is computed, and TensorRT wants a constant",
    ),
    "dynamic shape": (
        lambda: model([node("Relu", "x")], shape=("batch", 4)), "tensor x: a dynamic shape [None, 4]"
    ),
    "unknown shape": (
        lambda: model([node("NonZero", "x", to="z"), node("Cast", "z", to="y")]), "cannot be inferred"
    ),
    "nine dimensions": (lambda: model([node("Relu", "x")], shape=(1,) * 9), "tensor x: 9 dimensions"),
    "second output": (two_outputs, "LayerNormalization y: has a second output, which TensorRT does not make"),
    "attention over two dimensions": (two_dimensions, "y: its input q has neither 3 nor 4 dimensions"),
    "attention in float32": (
        lambda: one_node("Attention", TensorProto.FLOAT, {}, q=SHAPE, k=SHAPE, v=SHAPE),
        "Attention y: of type FLOAT and heads 16 wide: TensorRT has kernels for half precision",
    ),
    "softcap": (lambda: attention(softcap=1.0), "Attention y: has softcap, which TensorRT does not take"),
    "past": (with_a_past, "Attention y: has keys and values of the past"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_graph_that_tensorrt_would_refuse(case: str, tmp_path: Path) -> None:
    make, finding = BAD[case]
    found = report(make(), tmp_path).findings
    assert any(finding in line for line in found), found


@pytest.mark.parametrize(
    "good",
    [lambda: model([node("Relu", "x")]),
     lambda: model([node("Gather", "x", "i", axis=1)], constants=INDEX),
     lambda: model([node("Add", "i", "i", to="j"), node("Gather", "x", "j", axis=1)], constants=INDEX),
     attention],
    ids=["float", "constant integer", "integer folded from constants", "attention"],
)  # fmt: skip
def test_a_graph_without_a_fault(good: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    assert report(good(), tmp_path).findings == ()


def test_weights_that_are_not_there(half_bundle: Path, tmp_path: Path) -> None:
    folder = damage.copy(half_bundle, tmp_path)
    weights = folder / "vae_decoder.bin"
    weights.write_bytes(weights.read_bytes()[:-4096])
    graph = folder / damage.network(folder, "vae_decoder")["graphs"]["tensorrt"]
    assert any("no bytes up to" in line for line in check_graph(graph, "11").findings)
    weights.unlink()
    missing = [line for line in check_graph(graph, "11").findings if "in vae_decoder.bin" in line]
    assert len(missing) > 20


def test_the_command_hashes_what_it_reads(
    half_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = damage.copy(half_bundle, tmp_path)
    damage.flip(folder / "vae_decoder.bin")
    assert call(main, "check", folder) == 1
    assert "file vae_decoder.bin" in capsys.readouterr().err
    assert call(main, "check", tmp_path / "none") == 1
    assert call(main, "check", folder, "--tensorrt", "9") == 2
