"""What the real compiler makes of tiny graphs, read from its log; no GPU takes part."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svd_engine.errors import BackendUnavailable, ExportError, SettingsError
from svd_engine.install import install_line
from svd_export.compiled import BYTES, Compiled, Kernel, compile_graph, parse_errors, read_log, targets

HALF = TensorProto.FLOAT16


def saved(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    constants: dict[str, tuple[int, ...]] | None = None,
    kind: int = HALF,
) -> Path:
    """A graph with the output `y`; constants are drawn."""
    random = np.random.default_rng(0)
    numpy_type = helper.tensor_dtype_to_np_dtype(kind)
    tensors = [
        numpy_helper.from_array(random.normal(size=shape).astype(numpy_type), name)
        for name, shape in (constants or {}).items()
    ]
    taken = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()]
    output = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(nodes, "g", taken, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def node(op: str, *inputs: str, to: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(inputs), [to], name=f"{op}_{to}", **attributes)


def attention(folder: Path, **attributes: Any) -> Path:
    shape = (2, 5, 256, 64)
    return saved(folder, [node("Attention", "q", "k", "v", **attributes)], dict.fromkeys("qkv", shape))


def test_a_pointwise_kernel_reads_and_writes_its_tensor_once(tmp_path: Path) -> None:
    compiled = compile_graph(saved(tmp_path, [node("Relu", "x")], {"x": (4, 8, 16)}), "sm89")
    (kernel,) = compiled.kernels
    size = 4 * 8 * 16 * 2
    assert (kernel.kind, kernel.read_bytes, kernel.written_bytes) == ("kgen", size, size)
    assert (kernel.family, kernel.nodes) == ("__myl_Relu", ("Relu_y",))
    assert (compiled.activation_bytes, compiled.weights_bytes) == (0, 0)


def test_a_product_reads_its_weights_too(tmp_path: Path) -> None:
    graph = saved(tmp_path, [node("MatMul", "x", "w")], {"x": (1024, 320)}, {"w": (320, 640)})
    compiled = compile_graph(graph, "sm89")
    product = compiled.by_kind()["gemm"]
    least = (1024 * 320 + 320 * 640) * 2
    assert least <= product.read_bytes < least + 64  # two scalars
    assert product.written_bytes == 1024 * 640 * 2
    assert [k.flop for k in compiled.kernels if k.kind == "gemm"] == [2 * 1024 * 320 * 640]
    assert not any(kernel.float32 for kernel in compiled.kernels)
    assert compiled.weights_bytes >= 320 * 640 * 2
    assert compiled.activation_bytes >= 0


def test_attention_is_one_kernel(tmp_path: Path) -> None:
    compiled = compile_graph(attention(tmp_path), "sm89")
    assert compiled.fused_attentions == 1
    assert sum(kernel.flop for kernel in compiled.kernels) == 4 * 2 * 5 * 256 * 256 * 64
    assert sum("Attention_y" in kernel.nodes for kernel in compiled.kernels if "mha" in kernel.name) == 1


def test_totals_are_sums_and_largest_first(tmp_path: Path) -> None:
    nodes = [node("Conv", "x", "w", to="z", pads=[1, 1, 1, 1]), node("Sigmoid", "z")]
    compiled = compile_graph(saved(tmp_path, nodes, {"x": (2, 32, 64, 64)}, {"w": (32, 32, 3, 3)}), "sm86")
    assert "correlation" in compiled.by_kind()
    assert sum(kernel.flop for kernel in compiled.kernels) == 2 * 2 * 32 * 64 * 64 * 32 * 9
    for groups in (compiled.by_kind(), compiled.by_family()):
        assert sum(t.kernels for t in groups.values()) == len(compiled.kernels) == compiled.total.kernels
        assert sum(t.bytes for t in groups.values()) == compiled.total.bytes
        assert list(groups.values()) == sorted(groups.values(), key=lambda t: -t.bytes)
    figures = compiled.figures()
    assert figures.model_dump() == {
        "kernels": len(compiled.kernels),
        "read_bytes": compiled.total.read_bytes,
        "written_bytes": compiled.total.written_bytes,
        "activation_bytes": compiled.activation_bytes,
        "weights_bytes": compiled.weights_bytes,
    }


def test_the_same_graph_gives_the_same_figures(tmp_path: Path) -> None:
    graph = attention(tmp_path)
    first, second = (compile_graph(graph, "sm89").figures() for _ in range(2))
    assert first == second


def test_what_it_refuses_it_says(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    assert parse_errors(attention(good)) == ()
    graph = attention(bad, softmax_precision=1)
    (said,) = parse_errors(graph)
    assert said.startswith("Attention Attention_y: ")
    assert "softmax precision is not supported" in said
    with pytest.raises(ExportError, match="softmax precision is not supported"):
        compile_graph(graph, "sm89")


def test_what_it_takes_and_cannot_build_it_says(tmp_path: Path) -> None:
    graph = saved(tmp_path, [node("Attention", "q", "k", "v")], dict.fromkeys("qkv", (1, 1, 64, 512)))
    assert parse_errors(graph) == ()
    with pytest.raises(ExportError, match="not supported by a dedicated kernel"):
        compile_graph(graph, "sm89")


def test_targets(tmp_path: Path) -> None:
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(targets())
    assert "current" not in targets()
    with pytest.raises(SettingsError, match=r"expected one of sm75, .*, got 'sm90'\. Choose one of these"):
        compile_graph(attention(tmp_path), "sm90")


@pytest.mark.parametrize("work", [lambda path: compile_graph(path, "sm89"), parse_errors])
def test_without_the_compiler(work: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        BackendUnavailable,
        match=rf"backend tensorrt-rtx: expected .*Run: {re.escape(install_line('tensorrt-rtx'))}",
    ):
        work(attention(tmp_path))


def line(kind: str = "kgen", inputs: str = "", dtype: str = "Half") -> str:
    made = (
        f"{{ Name: y, Dimensions: [2,3], Strides: [3,1], StrideOrder: [1,0], Datatype: {dtype}, Format: x }}"
    )
    return (
        f"Name: __myl_Some_myl0_1, LayerType: {kind}, Inputs: [{inputs}], Constants: [], Outputs: [ {made}], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a][ONNX Layer: b][ONNX Layer: a]"
    )


def tensors(shapes: list[list[int]]) -> str:
    """As the log has them."""
    sides = (",".join(map(str, shape)) for shape in shapes)
    return ", ".join(
        f"{{ Name: x, Dimensions: [{s}], Strides: [1], Datatype: Half, Format: x }}" for s in sides
    )


@pytest.mark.parametrize(
    ("name", "kind", "inputs", "constants", "made", "flop"),
    [
        ("_gemm_mha_v2_1", "kgen", [[56, 448, 32], [56, 32, 77], [56, 77, 32]], [], [56, 448, 32],
         4 * 56 * 448 * 77 * 32),
        ("node_conv2d_1", "correlation", [[2, 8, 6, 7], [2, 16, 6, 7]],
         [[16, 8, 3, 3], [1], [1], [1, 16, 1, 1]], [2, 16, 6, 7], 2 * 2 * 16 * 6 * 7 * 8 * 9),
        ("__myl_CorrAdd_1", "runtime_fusion", [[1, 64, 1, 1], [1, 64, 3, 96]],
         [[64, 64, 3, 1], [1, 64, 1, 1]], [1, 64, 3, 96], 2 * 64 * 3 * 96 * 64 * 3),
        ("__myl_FcAddAdd_1", "runtime_fusion", [[784, 64], [784, 256]], [[1, 64], [256, 64]], [784, 64],
         2 * 784 * 64 * 256),
        ("__mye+__mye_1", "gemm", [[1254, 64]], [[3, 64, 32], [1]], [3, 1254, 32], 2 * 3 * 1254 * 32 * 64),
        ("node_MatMul_1", "gemm", [[1, 96, 448]], [[1, 96, 96], [1]], [1, 96, 448], 2 * 96 * 448 * 96),
        ("node_MatMul_1", "gemm", [[4, 5]], [], [4, 5], 0),
        ("__myl_Silu_1", "kgen", [[4, 5]], [[5, 5]], [4, 5], 0),
    ],
    ids=["attention", "convolution", "fused convolution", "fused product", "products side by side",
         "weights first", "no pair", "no product"],
)  # fmt: skip
def test_a_kernels_operations_follow_from_its_tensors(
    name: str, kind: str, inputs: Any, constants: Any, made: Any, flop: int
) -> None:
    logged = (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(inputs)}], Constants: [ {tensors(constants)}], "
        f"Outputs: [ {tensors([made])}], TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a]"
    )
    (kernel,) = read_log([*MEMORY, logged]).kernels
    assert (kernel.flop, kernel.float32) == (flop, False)
    (kernel,) = read_log([*MEMORY, logged.replace("Half", "Float")]).kernels
    assert (kernel.flop, kernel.float32) == (flop, flop > 0)


MEMORY = ["Total Activation Memory: 12 bytes", "Total Weights Memory: 34 bytes"]


def test_a_log_is_read() -> None:
    scalar = "{ Name: s, Dimensions: [], Strides: [], StrideOrder: [], Datatype: Float, Format: x }"
    compiled = read_log(
        ["anything", *MEMORY, line(inputs=f" {scalar}, {scalar}"), line("signal"), line("wait")]
    )
    assert compiled == Compiled((Kernel("__myl_Some_myl0_1", "kgen", 8, 12, ("a", "b")),), 12, 34)


@pytest.mark.parametrize("lines", [[], MEMORY, [line()], [line(), MEMORY[0]]])
def test_a_log_without_kernels_or_memory(lines: list[str]) -> None:
    with pytest.raises(ExportError, match="Build with profiling verbosity DETAILED"):
        read_log(lines)


def test_a_type_that_is_not_known() -> None:
    with pytest.raises(ExportError, match=f"expected tensors of type {', '.join(BYTES)}, got Odd"):
        read_log([*MEMORY, line(dtype="Odd")])
