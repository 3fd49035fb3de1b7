"""Attention as a graph shows it: the operator, or the three products that a runtime may fuse into it."""

from __future__ import annotations

from typing import Any

import onnx

Shape = tuple[int | None, ...]


class Graph:
    """An ONNX graph whose shapes are inferred: who makes a tensor, who takes it, of which type and shape."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        self.constants = {tensor.name for tensor in graph.initializer}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
            if self.constants.issuperset(filter(None, node.input)):
                self.constants.update(node.output)
        kinds = onnx.TensorProto.DataType
        self._types = {tensor.name: kinds.Name(tensor.data_type) for tensor in graph.initializer}
        self._shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            self._types[value.name] = kinds.Name(kind.elem_type)
            if kind.HasField("shape"):
                self._shapes[value.name] = tuple(
                    side.dim_value if side.HasField("dim_value") else None for side in kind.shape.dim
                )
        made = (name for node in self.nodes for name in filter(None, node.output))
        self.values = list(dict.fromkeys([*(value.name for value in graph.input), *self._types, *made]))

    def type_of(self, name: str) -> str | None:
        return self._types.get(name)

    def shape_of(self, name: str) -> Shape | None:
        return self._shapes.get(name)

    def maker(self, name: str) -> Any:
        """The node behind a tensor, casts skipped; None for inputs and constants."""
        node = self.producers.get(name)
        return self.maker(node.input[0]) if node is not None and node.op_type == "Cast" else node

    def taker(self, name: str) -> Any:
        """The only node that takes a tensor, casts skipped; None when there are several."""
        nodes = self.consumers.get(name, [])
        if len(nodes) != 1:
            return None
        return self.taker(nodes[0].output[0]) if nodes[0].op_type == "Cast" else nodes[0]


def attention_width(node: Any, graph: Graph) -> int | None:
    """Width of a head, the last axis of the queries, of an Attention, or of a Softmax between two products:

        Softmax(MatMul(Mul(q, constant), k^T), last axis) -> MatMul(., v)

    None for a Softmax with anything else around it.  The constant is the scale: before the product, where
    half precision holds it.
    """
    if node.op_type == "Attention":
        return _last(graph.shape_of(node.input[0]))
    before, after = graph.maker(node.input[0]), graph.taker(node.output[0])
    if not (_is(before, "MatMul") and _is(after, "MatMul") and _over_last_axis(node, graph)):
        return None
    if graph.maker(after.input[0]) is not node:  # the weights are the left factor
        return None
    scaled = [_is_scaled(graph.maker(name), graph) for name in before.input]
    return _last(graph.shape_of(before.input[0])) if any(scaled) else None


def _is_scaled(node: Any, graph: Graph) -> bool:
    return _is(node, "Mul") and any(
        name in graph.constants and all(side == 1 for side in graph.shape_of(name) or ())
        for name in node.input
    )


def _over_last_axis(softmax: Any, graph: Graph) -> bool:
    axis = next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)
    return axis in (-1, len(graph.shape_of(softmax.input[0]) or ()) - 1)


def _is(node: Any, op: str) -> bool:
    return node is not None and node.op_type == op


def _last(shape: Shape | None) -> int | None:
    return shape[-1] if shape else None
