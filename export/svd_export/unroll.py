"""Work on single frames, traced once, written out for each frame.

Between the markers of `svd_engine.networks.single_frames` a traced graph has the work of one frame.  Here
it becomes that of all, one frame after the other, as tracing every frame would have left it:

    x -> OneFrame -> work -> AllFrames -> y

    x -> Slice, Squeeze -> work -> Unsqueeze -+
    x -> Slice, Squeeze -> work -> Unsqueeze -+-> Concat -> y
    ...
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from svd_engine.networks.single_frames import ALL_FRAMES, DOMAIN, ONE_FRAME


def unroll(model: ir.Model) -> None:
    """Edits a traced model in place; one without markers stays as it is."""
    graph = model.graph
    work = _Work(graph)
    for node in list(graph):
        work.take(node)
    for node in reversed(work.replaced):
        graph.remove(node, safe=True)
    graph.opset_imports.pop(DOMAIN, None)


class _Work:
    """The nodes of one frame, met in their order, and what stands for each of their values in every frame."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.frames: dict[ir.Value, list[ir.Value]] = {}
        self.waiting: list[ir.Node] = []  # of one frame, not yet written out
        self.replaced: list[ir.Node] = []

    def take(self, node: ir.Node) -> None:
        if (node.domain, node.op_type) == (DOMAIN, ONE_FRAME):
            self.take_apart(node)
        elif (node.domain, node.op_type) == (DOMAIN, ALL_FRAMES):
            self.put_together(node)
        elif any(value in self.frames for value in node.inputs):
            self.waiting.append(node)
            self.frames |= {value: [] for value in node.outputs}
        else:
            return
        self.replaced.append(node)

    def take_apart(self, marker: ir.Node) -> None:
        (whole,), (frame,) = marker.inputs, marker.outputs
        assert whole is not None
        assert whole.shape is not None
        axis = marker.attributes["axis"].as_int()
        along = self.constant(axis)
        self.frames[frame] = []
        for index in range(int(whole.shape[axis])):
            bounds = self.constant(index), self.constant(index + 1)
            cut = self.add(marker, "Slice", [whole, *bounds, along], {}, f"{frame.name}.{index}.cut")
            cut.type = frame.type
            cut.shape = ir.Shape([1 if at == axis else side for at, side in enumerate(whole.shape)])
            taken = self.add(marker, "Squeeze", [cut, along], {}, f"{frame.name}.{index}")
            self.frames[frame].append(_as(frame, taken))

    def put_together(self, marker: ir.Node) -> None:
        (frame,), (whole,) = marker.inputs, marker.outputs
        assert frame is not None
        axis, count = (marker.attributes[name].as_int() for name in ("axis", "frames"))
        for index in range(count):
            for node in self.waiting:
                self.write_out(node, index, marker)
        self.waiting = []
        sides = []
        for value in self.frames[frame]:
            side = self.add(marker, "Unsqueeze", [value, self.constant(axis)], {}, f"{value.name}.side")
            side.type = frame.type
            assert frame.shape is not None
            side.shape = ir.Shape([*frame.shape[:axis], 1, *frame.shape[axis:]])
            sides.append(side)
        made = _as(whole, self.add(marker, "Concat", sides, {"axis": axis}, f"{whole.name}"))
        ir.convenience.replace_all_uses_with(whole, made, replace_graph_outputs=True)
        whole.name = None

    def write_out(self, node: ir.Node, index: int, before: ir.Node) -> None:
        """The same for one frame."""
        inputs = [self.frames[value][index] if value in self.frames else value for value in node.inputs]
        made = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs)
        )
        self.graph.insert_before(before, made)
        for value, one in zip(node.outputs, made.outputs, strict=True):
            one.name = f"{value.name}.{index}"
            self.frames[value].append(_as(value, one))

    def add(
        self, before: ir.Node, op: str, inputs: list[ir.Value], attributes: dict[str, int], name: str
    ) -> ir.Value:
        made = ir.node(op, inputs, attributes or None)
        self.graph.insert_before(before, made)
        value: ir.Value = made.outputs[0]
        value.name = name
        return value

    def constant(self, number: int) -> ir.Value:
        """[number], an initializer of the graph."""
        name = f"just_{number}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array([number], np.int64), name=name)
            self.graph.register_initializer(
                ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([1]))
            )
        return self.graph.initializers[name]


def _as(value: ir.Value, other: ir.Value) -> ir.Value:
    """`other`, told to be of the type and shape of `value`."""
    other.type, other.shape = value.type, value.shape
    return other
