"""Normalisations over a video's frames, for TensorRT: statistics before the frames are turned, scale with it.

A temporal half reads images [B*F,C,h,w] as [B,C,F,h*w], and its sum is turned back.  Where the first
normalisation there is one kernel, the compiler copies the images into that order, and the sum back.  With T
one such tensor, read or written:

    before   turn 2 T, normalisation with SiLU 2 T, ... last convolution with the sum 3 T, turn back 2 T
    here     statistics 1 T, scale with SiLU and turn 2 T, ... last convolution 2 T, sum with turn back 3 T

The same function: mean and variance of a video are those of its frames put together, and a sum of turned
tensors is the turned sum.  Statistics are float32, taken of the images as they lie in memory, frame by frame,
as `svd_engine.networks.decoder_segments.moments` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from svd_export.primitives import Scope, drop_unused, dtype_of, present, reshaped, static

TURN = (0, 2, 1, 3)


@dataclass(frozen=True)
class TemporalHalf:
    """The temporal half of a resnet: view and turn of its images, and what turns its sum back."""

    view: ir.Value  # [B,F,C,h*w] of images
    norm: ir.Node
    branch: ir.Value  # [B,C,F,h*w], what is added to the turned images
    result: ir.Node  # the Reshape to images

    @property
    def images(self) -> ir.Value:
        reshape = self.view.producer()
        assert reshape is not None
        return present(reshape.inputs[0])


def split_turned_norms(graph: ir.Graph) -> None:
    """Edits `graph` in place, wherever both ends of a temporal half are as above."""
    for norm in [node for node in graph if node.op_type == "GroupNormalization"]:
        half = half_of(norm)
        if half is not None:
            normalise(graph, half)
            add(graph, half)
    drop_unused(graph)


def half_of(norm: ir.Node) -> TemporalHalf | None:
    turned = present(norm.inputs[0])
    turn = turned.producer()
    if turn is None or not turns(turn):
        return None
    view = present(turn.inputs[0])
    reshape = view.producer()
    if reshape is None or reshape.op_type != "Reshape" or len(static(view)) != 4:
        return None
    images = static(present(reshape.inputs[0]))
    readers = [node for node, _ in turned.uses() if node is not norm]
    if len(readers) != 1 or readers[0].op_type != "Add" or len(images) != 4:
        return None
    back = only_reader(readers[0])
    result = None if back is None or not turns(back) else only_reader(back)
    if result is None or result.op_type != "Reshape" or static(result.outputs[0]) != images:
        return None
    (branch,) = (value for value in readers[0].inputs if value is not turned)
    return TemporalHalf(view, norm, present(branch), result)


def turns(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == TURN


def only_reader(node: ir.Node) -> ir.Node | None:
    (value,) = node.outputs
    readers = list(value.uses())
    return readers[0].node if len(readers) == 1 and not value.is_graph_output() else None


def normalise(graph: ir.Graph, half: TemporalHalf) -> None:
    scope = Scope(graph, half.norm)
    scale, bias = (present(value) for value in half.norm.inputs[1:])
    groups = half.norm.attributes["num_groups"].as_int()
    epsilon = half.norm.attributes["epsilon"].as_float()
    videos, frames, channels, pixels = static(half.view)
    dtype, each = dtype_of(half.view), channels // groups

    def mean(value: ir.Value, axes: list[int]) -> ir.Value:
        wanted = scope.constant(f"axes_{'_'.join(map(str, axes))}", ir.tensor(np.array(axes, np.int64)))
        shape = [1 if axis in axes else side for axis, side in enumerate(static(value))]
        return scope.node("ReduceMean", value, wanted, shape=ir.Shape(shape), keepdims=1)

    def wide(value: ir.Value) -> ir.Value:
        return scope.cast(value, ir.DataType.FLOAT)

    def by_group(value: ir.Value) -> ir.Value:
        number = ir.tensor(reshaped(value, (1, 1, groups, each)).numpy().astype(np.float32))
        return scope.constant(f"{value.name}_by_group", number)

    _, _, height, width = static(half.images)
    last = scope.node(
        "Transpose",
        half.images,
        shape=ir.Shape((videos * frames, height, width, channels)),
        perm=[0, 2, 3, 1],
    )
    of_frames = scope.reshape(last, (videos * frames, pixels, groups, each))
    center = mean(wide(of_frames), [1, 3])  # [B*F,1,G,1]
    near = scope.cast(center, dtype)  # so that a compiler reads what is in that type
    apart = wide(scope.node("Sub", of_frames, near))
    off = scope.node("Sub", center, wide(near))
    variance = scope.node("Sub", mean(scope.node("Mul", apart, apart), [1, 3]), scope.node("Mul", off, off))
    center, variance = (scope.reshape(value, (videos, frames, groups, 1)) for value in (center, variance))
    middle = mean(center, [1])  # [B,1,G,1], of the video
    off = scope.node("Sub", center, middle)
    variance = mean(scope.node("Add", variance, scope.node("Mul", off, off)), [1])
    small = scope.constant(f"epsilon_{epsilon:g}", ir.tensor(np.array(epsilon, np.float32)))
    deviation = scope.node("Sqrt", scope.node("Add", variance, small))
    shape = ir.Shape((videos, 1, groups, each))
    factor = scope.node("Div", by_group(scale), deviation, shape=shape)
    summand = scope.node("Sub", by_group(bias), scope.node("Mul", factor, middle), shape=shape)
    factor, summand = (scope.reshape(value, (videos, 1, channels, 1)) for value in (factor, summand))
    normal = scope.node("Add", scope.node("Mul", wide(half.view), factor), summand)
    turned = scope.node(
        "Transpose",
        scope.cast(normal, dtype),
        shape=ir.Shape((videos, channels, frames, pixels)),
        perm=list(TURN),
    )
    scope.replace(turned)


def add(graph: ir.Graph, half: TemporalHalf) -> None:
    scope = Scope(graph, half.result)
    videos, frames, channels, pixels = static(half.view)
    back = scope.node(
        "Transpose", half.branch, shape=ir.Shape((videos, frames, channels, pixels)), perm=list(TURN)
    )
    scope.replace(scope.node("Add", half.images, scope.reshape(back, static(half.images))))
