"""Attention and GroupNormalization taken apart, into operators that every runtime has.

    Attention            softmax((q / sqrt(d)) k^T) v on [N,heads,L,d]: the scale before the product, where
                         float16 holds it, and each head's d kept as the last axis, which is the pattern that
                         TensorRT fuses; softmax in float32
    GroupNormalization   instance normalisation of [N,G,everything else] in float32, then scale and bias of
                         each channel in the type of the network, as the operator is defined (stash_type 1)

Both are exact.  The float32 islands are explicit casts here: no attribute of these operators asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod, sqrt

import numpy as np
import onnx_ir as ir


class Scope:
    """Makes nodes and constants beside one node, whose output they replace."""

    def __init__(self, graph: ir.Graph, replaced: ir.Node) -> None:
        self.graph, self.replaced = graph, replaced
        self.output = replaced.outputs[0]
        self.name = str(self.output.name)

    def node(
        self, op: str, *inputs: ir.Value, shape: ir.Shape | None = None, **attributes: int | float | list[int]
    ) -> ir.Value:
        """Of the first input's type; `shape` left out means its shape too."""
        made = ir.node(op, list(inputs), attributes or None)
        self.graph.insert_before(self.replaced, made)
        value = made.outputs[0]
        value.name = f"{self.name}_{op.lower()}_{len(self.graph)}"
        value.type = inputs[0].type
        value.shape = inputs[0].shape if shape is None else shape
        return value

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        made = self.node("Cast", value, to=dtype.value)
        made.type = ir.TensorType(dtype)
        return made

    def constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """An initializer; the first of a name stays."""
        if name not in self.graph.initializers:
            tensor.name = name
            value = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape)
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        name = f"shape_{'x'.join(map(str, shape))}"
        wanted = self.constant(name, ir.tensor(np.array(shape, np.int64)))
        return self.node("Reshape", value, wanted, shape=ir.Shape(shape))

    def replace(self, made: ir.Value) -> None:
        """Puts a value in the place of the node's output, and takes the node out of the graph."""
        ir.convenience.replace_all_uses_with(self.output, made, replace_graph_outputs=True)
        self.graph.remove(self.replaced, safe=True)
        made.name = self.name


def attention(scope: Scope) -> ir.Value:
    q, k, v = (present(value) for value in scope.replaced.inputs)
    (n, heads, tokens, width), keys = static(q), static(k)[2]
    dtype = dtype_of(q)
    attributes = scope.replaced.attributes
    assert attributes.keys() <= {"scale", "softmax_precision"}  # the rest would change what it computes
    scale = attributes["scale"].as_float() if "scale" in attributes else 1 / sqrt(width)
    factor = ir.tensor(np.array(scale, np.float32).astype(dtype.numpy()), dtype)
    scaled = scope.node("Mul", q, scope.constant(f"attention_scale_{scale:g}", factor))
    turned = scope.node("Transpose", k, shape=ir.Shape((n, heads, width, keys)), perm=[0, 1, 3, 2])
    scores = scope.node("MatMul", scaled, turned, shape=ir.Shape((n, heads, tokens, keys)))
    weights = scope.node("Softmax", scope.cast(scores, ir.DataType.FLOAT), axis=-1)
    return scope.node("MatMul", scope.cast(weights, dtype), v, shape=ir.Shape((n, heads, tokens, width)))


def group_normalization(scope: Scope) -> ir.Value:
    return instance_normalization(scope, ir.DataType.FLOAT)


def instance_normalization(scope: Scope, inside: ir.DataType) -> ir.Value:
    """A GroupNormalization as an InstanceNormalization of type `inside`."""
    x, scale, bias = (present(value) for value in scope.replaced.inputs)
    shape, dtype = static(x), dtype_of(x)
    groups = scope.replaced.attributes["num_groups"].as_int()
    epsilon = scope.replaced.attributes["epsilon"].as_float()
    whole = scope.cast(scope.reshape(x, (shape[0], groups, prod(shape[1:]) // groups)), inside)
    one = scope.constant(f"ones_{groups}", ir.tensor(np.ones(groups, inside.numpy()), inside))
    zero = scope.constant(f"zeros_{groups}", ir.tensor(np.zeros(groups, inside.numpy()), inside))
    normal = scope.cast(scope.node("InstanceNormalization", whole, one, zero, epsilon=epsilon), dtype)
    by_channel = (shape[1], *(1 for _ in shape[2:]))
    factor, summand = (
        scope.constant(f"{value.name}_by_channel_{len(shape)}d", reshaped(value, by_channel))
        for value in (scale, bias)
    )
    return scope.node("Add", scope.node("Mul", scope.reshape(normal, shape), factor), summand)


Parts = Mapping[str, Callable[[Scope], ir.Value]]  # by operator: what takes its place
PARTS: Parts = {
    "Attention": attention,
    "GroupNormalization": group_normalization,
}


def take_apart(graph: ir.Graph, nodes: Iterable[ir.Node], parts: Parts = PARTS) -> None:
    """Replaces these nodes of `graph` in place; the constants that only they used go with them."""
    for node in nodes:
        scope = Scope(graph, node)
        scope.replace(parts[node.op_type](scope))
    drop_unused(graph)


def drop_unused(graph: ir.Graph) -> None:
    """Takes out what nothing reads: nodes, and then constants."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def present(value: ir.Value | None) -> ir.Value:
    assert value is not None  # SVD masks nothing
    return value


def static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(side) for side in value.shape.numpy())  # raises when one is dynamic


def dtype_of(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def reshaped(value: ir.Value, shape: tuple[int, ...]) -> ir.TensorProtocol:
    assert value.const_value is not None
    return ir.tensor(value.const_value.numpy().reshape(shape), value.const_value.dtype)
