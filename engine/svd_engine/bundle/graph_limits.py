"""What a graph of a bundle takes, gives and allocates, known before it runs.  Reads graphs, never weights.

Every graph of a bundle has static shapes, so onnx's shape inference knows each tensor inside.  A graph whose
tensors it does not know, or that makes large ones out of nothing, is not ours: a runtime computes what
follows from constants alone while it loads, so that a few bytes can ask for any amount of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from svd_engine.errors import BundleError
from svd_engine.spec.tensors import NetworkSpec, TensorSpec

if TYPE_CHECKING:
    import onnx

CONSTANT_BYTES = 2**30  # of what is computed from constants alone, beyond the size of the weights
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # share the memory of their first input


def check_limits(
    graph: Path, model: onnx.ModelProto, spec: NetworkSpec, weights_bytes: int, memory: int | None
) -> None:
    """Holds a graph against its network's table and against memory.

    Raises BundleError when its inputs or outputs are not those of `spec`; when a tensor inside has no static
    shape, or one that contradicts another; when constants alone make more than `weights_bytes` and
    CONSTANT_BYTES; when the tensors of one run cannot fit into `memory` bytes, None being any amount.
    """
    _check_table(graph, model.graph, spec)
    sizes = _sizes(graph, model)
    constants = _constants(model.graph)
    made = sum(sizes[name] for name in constants)
    if made > weights_bytes + CONSTANT_BYTES:
        raise _refused(graph, f"at most {weights_bytes + CONSTANT_BYTES:,} bytes of constants", f"{made:,}")
    needed = _peak_of_run(model.graph, sizes, constants)
    if memory is not None and needed > memory:
        raise BundleError(
            f"graph {graph}",
            expected=f"a run that fits into the {memory:,} bytes of this device",
            got=f"at least {needed:,} bytes of tensors at once",
            remedy="Run it on a device with more memory, or export a smaller profile.",
        )


def run_bytes(graph: Path, model: onnx.ModelProto) -> int:
    """Bytes of the tensors of one run that are alive at once, at least; see `peak_bytes`.

    Raises BundleError when a tensor inside has no static shape.
    """
    return _peak_of_run(model.graph, _sizes(graph, model), _constants(model.graph))


def _peak_of_run(graph: onnx.GraphProto, sizes: dict[str, int], constants: set[str]) -> int:
    return peak_bytes(graph, {name: size for name, size in sizes.items() if name not in constants})


def peak_bytes(graph: onnx.GraphProto, sizes: dict[str, int]) -> int:
    """Bytes alive at once, at least: the tensors of `sizes` that are still to be read after some node.

    A lower bound, because a runtime may compute in place: a node's inputs are not counted with its outputs.
    """
    owner: dict[str, str] = {}  # of each view's memory
    for node in graph.node:
        if node.op_type in VIEWS and not node.domain:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    last = {owner.get(value.name, value.name): len(graph.node) for value in graph.output}
    for place, node in enumerate(graph.node):
        for name in node.input:
            memory = owner.get(name, name)
            last[memory] = max(last.get(memory, 0), place)
    ending: dict[int, list[str]] = {}
    for name, place in last.items():
        ending.setdefault(place, []).append(name)
    alive = peak = sum(sizes.get(value.name, 0) for value in graph.input)
    for place, node in enumerate(graph.node):
        alive += sum(sizes.get(name, 0) for name in node.output if name not in owner and name in last)
        alive -= sum(sizes.get(name, 0) for name in ending.get(place, ()))
        peak = max(peak, alive)
    return peak


def _check_table(graph: Path, content: onnx.GraphProto, spec: NetworkSpec) -> None:
    weights = {tensor.name for tensor in content.initializer}
    inputs = {_declared(value) for value in content.input if value.name not in weights}
    expected = {str(tensor) for tensor in spec.inputs}
    outputs = {_declared(value) for value in content.output}
    if inputs != expected or outputs != {str(tensor) for tensor in spec.outputs}:
        raise _refused(
            graph,
            f"{', '.join(sorted(expected))} -> {', '.join(sorted(map(str, spec.outputs)))}",
            f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}",
        )


def _declared(value: onnx.ValueInfoProto) -> str:
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.tensor_type
    shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim)
    name = tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "of no type"
    return str(TensorSpec(value.name, shape, name))


def _sizes(graph: Path, model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every tensor inside but the weights that lie in another file."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    for what in _hidden(model):
        raise _refused(graph, "operators alone, and dense weights", what)
    alike = [node for node in model.graph.node if node.op_type == "GroupNormalization" and not node.domain]
    known = {node.output[0] for node in alike}  # onnx infers nothing of them: held against the input below
    bare = type(model)()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]  # what a graph says of its own tensors may be untrue
    bare.graph.value_info.extend(value for value in model.graph.value_info if value.name in known)
    try:  # without data propagation, which would compute what this function is to find
        inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise _refused(graph, "shapes that agree", str(error).strip()) from error
    sizes = {
        tensor.name: _bytes(tensor.data_type, tensor.dims)
        for tensor in inferred.initializer
        if not uses_external_data(tensor)
    }
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        sides = [side.dim_value if side.HasField("dim_value") else -1 for side in kind.shape.dim]
        if kind.HasField("shape") and kind.elem_type and min(sides, default=0) >= 0:
            sizes.setdefault(value.name, _bytes(kind.elem_type, sides))
    made = (name for node in inferred.node for name in node.output if name)
    for name in (*(value.name for value in inferred.input), *made):
        if name not in sizes:
            raise _refused(graph, "static shapes of every tensor", f"none of {name!r}")
    for node in alike:
        if sizes[node.output[0]] != sizes[node.input[0]]:
            raise _refused(graph, "an output of its input's size from GroupNormalization", node.output[0])
    return sizes


def _hidden(model: onnx.ModelProto) -> Iterator[str]:
    """Where shape inference over the main graph does not look."""
    yield from (f"a function {function.name!r}" for function in model.functions)
    yield from (f"a sparse tensor {t.values.name!r}" for t in model.graph.sparse_initializer)
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            yield f"a graph inside {node.op_type} {node.name!r}"


def _constants(graph: onnx.GraphProto) -> set[str]:
    """What follows from constants alone, without the weights that lie in another file."""
    from onnx.external_data_helper import uses_external_data

    constants = {tensor.name for tensor in graph.initializer}
    outside = {tensor.name for tensor in graph.initializer if uses_external_data(tensor)}
    for node in graph.node:
        if constants.issuperset(filter(None, node.input)):
            constants.update(filter(None, node.output))
    return constants - outside


def _bytes(kind: int, sides: Sequence[int]) -> int:
    """Never less than the runtime takes: types below a byte count as one."""
    from onnx.helper import tensor_dtype_to_np_dtype

    return int(prod(sides)) * max(1, int(tensor_dtype_to_np_dtype(kind).itemsize))


def _refused(graph: Path, expected: str, got: str) -> BundleError:
    remedy = "Do not run this bundle; export one from the checkpoint."
    return BundleError(f"graph {graph}", expected=expected, got=got, remedy=remedy)
