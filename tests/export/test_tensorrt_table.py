"""The table says of small graphs what the real parser and compiler do, one for each rule that ours need."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svd_engine.errors import ExportError
from svd_export.compiled import build, compile_graph, parse_errors
from svd_export.graph_check import check_graph

FLOAT, HALF, BF16, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.BOOL


def saved(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, tuple[int, ...]]],
    outputs: list[str],
    constants: dict[str, Any] | None = None,
    opset: int = 23,
    shape: tuple[int, ...] | None = None,
) -> Path:
    """Inputs: type and shape by name; `shape`: of the output, where onnx does not infer it."""
    kind = next(iter(inputs.values()))[0]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *of) for name, of in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def attention(
    kind: int = HALF,
    width: int = 64,
    opset: int = 23,
    mask: int | None = None,
    outputs: tuple[str, ...] = ("y",),
    flat: bool = False,
    **attributes: Any,
) -> Callable[[Path], Path]:
    """Two heads of 32 tokens; `flat`: heads side by side in the last of three dimensions."""
    shape = (1, 32, 2 * width) if flat else (1, 2, 32, width)
    inputs: dict[str, tuple[int, tuple[int, ...]]] = {name: (kind, shape) for name in "qkv"}
    if mask is not None:
        inputs["mask"] = (mask, (32, 32))
    node = helper.make_node("Attention", list(inputs), list(outputs), **attributes)
    return lambda folder: saved(folder, [node], inputs, [o for o in outputs if o], opset=opset)


def group_normalization(shape: tuple[int, ...], kind: int = HALF, opset: int = 23) -> Callable[[Path], Path]:
    numbers = shape[1] if opset >= 21 else 8  # before, a scale for each group
    one = np.ones(numbers, helper.tensor_dtype_to_np_dtype(kind))
    node = helper.make_node("GroupNormalization", ["x", "one", "one"], ["y"], num_groups=8)
    return lambda folder: saved(folder, [node], {"x": (kind, shape)}, ["y"], {"one": one}, opset, shape)


def product(kind: int) -> Callable[[Path], Path]:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return lambda folder: saved(folder, [node], {"x": (kind, (64, 64)), "w": (kind, (64, 64))}, ["y"])


def convolution(kind: int) -> Callable[[Path], Path]:
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    shapes = {"x": (kind, (1, 16, 8, 8)), "w": (kind, (16, 16, 3, 3))}
    return lambda folder: saved(folder, [node], shapes, ["y"])


FINE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "attention, float16, 64 wide": (attention(), "sm89"),
    "attention, float16, 80 wide": (attention(width=80), "sm89"),
    "attention, float16, 256 wide": (attention(width=256), "sm89"),
    "attention, float16, 9 wide": (attention(width=9), "sm89"),
    "attention, bfloat16": (attention(BF16), "sm86"),
    "attention, float16, Turing": (attention(), "sm75"),
    "attention over three dimensions": (attention(flat=True, q_num_heads=2, kv_num_heads=2), "sm89"),
    "attention, opset 24": (attention(opset=24), "sm89"),
    "a mask of numbers": (attention(mask=HALF), "sm89"),
    "a mask of booleans": (attention(mask=BOOL), "sm89"),
    "no softcap": (attention(softcap=0.0), "sm89"),
    "a scale": (attention(scale=0.5), "sm89"),
    "what a second output would hold": (attention(qk_matmul_output_mode=1), "sm89"),
    "group normalisation, four dimensions": (group_normalization((1, 32, 8, 8)), "sm89"),
    "group normalisation, five dimensions": (group_normalization((1, 32, 2, 8, 8)), "sm89"),
    "group normalisation, three dimensions": (group_normalization((1, 32, 8)), "sm89"),
    "group normalisation, opset 18": (group_normalization((1, 32, 8, 8), opset=18), "sm89"),
    "group normalisation, opset 21": (group_normalization((1, 32, 8, 8), opset=21), "sm89"),
    "group normalisation, float32": (group_normalization((1, 32, 8, 8), FLOAT), "sm75"),
    "group normalisation, bfloat16": (group_normalization((1, 32, 8, 8), BF16), "sm86"),
    "product, float32": (product(FLOAT), "sm86"),
    "product, float16, Turing": (product(HALF), "sm75"),
    "product, float32, Turing": (product(FLOAT), "sm75"),
    "convolution, float32, Turing": (convolution(FLOAT), "sm75"),
}
REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {  # last, what the table says
    "softmax_precision": (attention(softmax_precision=FLOAT), "has softmax_precision", "sm89"),
    "softmax_precision, float16": (attention(softmax_precision=HALF), "has softmax_precision", "sm89"),
    "softcap": (attention(softcap=1.0), "has softcap", "sm89"),
    "a second output": (attention(outputs=("y", "", "", "scores")), "has a second output", "sm89"),
}
NOT_BUILT: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "attention, float32, 64 wide": (attention(FLOAT), "of type FLOAT and heads 64 wide", "sm89"),
    "attention, float32, 80 wide": (attention(FLOAT, 80), "of type FLOAT and heads 80 wide", "sm89"),
    "attention, float16, 8 wide": (attention(width=8), "heads 8 wide", "sm89"),
    "attention, float16, 257 wide": (attention(width=257), "heads 257 wide", "sm89"),
    "attention, float16, 512 wide": (attention(width=512), "heads 512 wide", "sm89"),
    "attention, bfloat16, 512 wide": (attention(BF16, 512), "heads 512 wide", "sm89"),
    "attention, bfloat16, Turing": (attention(BF16), "of type BFLOAT16, which", "sm75"),
    "group normalisation, bfloat16, Turing": (
        group_normalization((1, 32, 8, 8), BF16), "of type BFLOAT16, which", "sm75"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FINE)
def test_taken_and_built(case: str, tmp_path: Path) -> None:
    make, target = FINE[case]
    graph = make(tmp_path)
    assert check_graph(graph, "11", target).findings == ()
    assert parse_errors(graph) == ()
    compiled = compile_graph(graph, target)
    if case.startswith("attention"):
        assert compiled.fused_attentions == sum(check_graph(graph, "11").fused.values()) == 1


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_parser(case: str, tmp_path: Path) -> None:
    make, finding, _ = REFUSED[case]
    graph = make(tmp_path)
    assert any(finding in line for line in check_graph(graph, "11").findings)
    assert parse_errors(graph) != ()


@pytest.mark.parametrize("case", NOT_BUILT)
def test_taken_by_the_parser_and_not_built(case: str, tmp_path: Path) -> None:
    make, finding, target = NOT_BUILT[case]
    graph = make(tmp_path)
    assert any(finding in line for line in check_graph(graph, "11", target).findings)
    assert parse_errors(graph) == ()
    with pytest.raises(ExportError):
        compile_graph(graph, target)


@pytest.mark.parametrize("kind", [FLOAT, HALF])
@pytest.mark.parametrize("width", [64, 512])
def test_attention_as_products(kind: int, width: int, tmp_path: Path) -> None:
    """Builds with every width and type, and is one kernel where the operator would be."""
    heads = (1, 2, 256, width)
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "turned"], ["scores"]),
        helper.make_node("Cast", ["scores"], ["wide"], to=FLOAT),
        helper.make_node("Softmax", ["wide"], ["weights"], axis=-1),
        helper.make_node("Cast", ["weights"], ["narrow"], to=kind),
        helper.make_node("MatMul", ["narrow", "v"], ["y"]),
    ]
    scale = np.array(0.125, helper.tensor_dtype_to_np_dtype(kind))
    graph = saved(tmp_path, nodes, {name: (kind, heads) for name in "qkv"}, ["y"], {"scale": scale})
    found = check_graph(graph, "11")
    assert found.findings == ()
    fused = int(kind == HALF and width == 64)
    assert (len(found.fused), len(found.apart)) == (fused, 1 - fused)
    assert compile_graph(graph, "sm89").fused_attentions == fused


def test_wide_attention_behind_products_builds_and_writes_its_scores(tmp_path: Path) -> None:
    """Why SVD's VAE decoder built with the operator, which alone does not: its inputs are made there."""
    tokens, width = 64, 512
    nodes, weights = [], {}
    for name in "qkv":
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}3"]),
            helper.make_node("Reshape", [f"{name}3", "heads"], [f"{name}4"]),
            helper.make_node("Transpose", [f"{name}4"], [name], perm=[0, 2, 1, 3]),
        ]
        weights[f"w{name}"] = np.random.default_rng(0).normal(size=(width, width)).astype(np.float16)
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["y"]))
    weights["heads"] = np.array([1, tokens, 1, width])
    compiled = compile_graph(
        saved(tmp_path, nodes, {"x": (HALF, (1, tokens, width))}, ["y"], weights), "sm89"
    )
    assert compiled.fused_attentions == 0
    assert any("MaxrSubExpSumDiv" in kernel.name for kernel in compiled.kernels)  # the softmax
    assert sum(kernel.kind == "gemm" for kernel in compiled.kernels) == 3  # q, k, v in one; scores; output


def sources(graph: Path, target: str) -> dict[str, str]:
    """By kernel: an engine for RTX holds its generated kernels as CUDA source, compiled on the card."""
    plan, _ = build(graph, target)
    found = {}
    for text in re.findall(rb"[\t\n\x20-\x7e]{2000,}", plan):
        if names := re.findall(r"__global__ void (?:__\w+\([^)]*\) )?(\w+)\(", text.decode()):
            found[names[-1]] = text.decode()
    return found


@pytest.mark.parametrize(("kind", "target"), [(HALF, "sm86"), (HALF, "sm89"), (BF16, "sm89")])
def test_group_normalisation_sums_in_float32(kind: int, target: str, tmp_path: Path) -> None:
    """Its kernel's accumulators are float, though what it reads and writes is not."""
    shape = (2, 64, 64, 64)
    kernels = sources(group_normalization(shape, kind)(tmp_path), target)
    (kernel,) = [text for name, text in kernels.items() if "Gnor" in name]
    (types,) = set(re.findall(r"\b(?:block_norm|tile_norm\w*)<(\w+),(\w+),", kernel))  # sums, tensors
    assert types == ("__myln_float", "__myln_half" if kind == HALF else "__myln_bf16")


@pytest.mark.parametrize(("kind", "scores"), [(HALF, "hmma_fp32"), (BF16, "hmma_bf16")])
def test_fused_attention_has_its_softmax_in_float32(kind: int, scores: str, tmp_path: Path) -> None:
    """Scores are summed in float32 (as bfloat16 products always are), and so is the softmax over them."""
    kernels = sources(attention(kind)(tmp_path), "sm89")
    (kernel,) = [text for name, text in kernels.items() if "gemm_mha" in name]
    first, _second = re.findall(r"fmha::\w+?_(hmma_\w+?)_traits", kernel)
    assert first == scores
    assert re.search(r"initialize\(DATA_TYPE_\w+, DATA_TYPE_\w+, DATA_TYPE_FP32,", kernel)
