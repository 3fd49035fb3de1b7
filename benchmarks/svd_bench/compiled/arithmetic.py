"""Floating-point operations of an ONNX graph, counted from the shapes of its products and convolutions.

2 per multiply-add, as everywhere here.  What is left out (normalisations, activations, softmax) is bound by
memory traffic and not by arithmetic.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from svd_engine.errors import ExportError
from svd_export.attention_pattern import Graph

if TYPE_CHECKING:
    import onnx


def flop_of(path: Path) -> int:
    """Of one call of the graph at `path`.  Raises ExportError where a shape cannot be inferred."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = Graph(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    return sum(_flop(node, graph) for node in graph.nodes)


def _flop(node: onnx.NodeProto, graph: Graph) -> int:
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"):
        return 0
    first, second, made = (_shape(graph, name) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Conv":  # weights [out, in / groups, *kernel]
        return 2 * prod(made) * prod(second[1:])
    if node.op_type == "ConvTranspose":  # weights [in, out / groups, *kernel]
        return 2 * prod(first) * prod(second[1:])
    if node.op_type == "Attention":  # q [N, heads, tokens, width], k [N, heads, keys, width]: two products
        return 4 * prod(first) * second[-2]
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * prod(made) * first[0 if transposed else -1]


def _shape(graph: Graph, name: str) -> tuple[int, ...]:
    shape = graph.shape_of(name)
    sides = tuple(side for side in shape or () if side is not None)
    if shape is None or len(sides) != len(shape):
        raise ExportError(
            f"tensor {name}",
            expected="a shape that can be inferred",
            got="none" if shape is None else str(list(shape)),
            remedy="Export the bundle again with this version of svd-engine.",
        )
    return sides
