"""The first normalisation of a temporal half, apart for TensorRT: the same function, and less traffic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from svd_engine.bundle.reading import Bundle
from svd_export.compiled import compile_graph
from svd_export.turned_norms import split_turned_norms

GROUPS, EPSILON = 32, 1e-5
TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
Change = Callable[[dict[str, onnx.NodeProto]], None]


def temporal_half(
    kind: int, videos: int, frames: int, channels: int, side: int, change: Change = lambda nodes: None
) -> onnx.ModelProto:
    """Images [B*F,C,s,s] -> turned, normalised, SiLU, a convolution over frames, their sum -> images."""
    rng = np.random.default_rng(0)
    pixels = side * side
    images, turned = (videos * frames, channels, side, side), (videos, channels, frames, pixels)
    weights = {
        "scale": 1 + rng.normal(size=channels),
        "bias": rng.normal(size=channels),
        "kernel": rng.normal(size=(channels, channels, 3, 1)) / channels,
        "square": rng.normal(size=(channels, channels, 3, 3)) / channels,
    }
    constants = [onnx.numpy_helper.from_array(w.astype(TYPES[kind]), name) for name, w in weights.items()]
    constants += [
        onnx.numpy_helper.from_array(np.array(shape, np.int64), name)
        for name, shape in {"by_frame": (videos, frames, channels, pixels), "by_image": images}.items()
    ]
    nodes = {
        "view": helper.make_node("Reshape", ["x", "by_frame"], ["viewed"]),
        "turn": helper.make_node("Transpose", ["viewed"], ["turned"], perm=[0, 2, 1, 3]),
        "norm": helper.make_node(
            "GroupNormalization", ["turned", "scale", "bias"], ["normal"], num_groups=GROUPS, epsilon=EPSILON
        ),
        "sigmoid": helper.make_node("Sigmoid", ["normal"], ["gate"]),
        "silu": helper.make_node("Mul", ["normal", "gate"], ["active"]),
        "conv": helper.make_node("Conv", ["active", "kernel"], ["branch"], pads=[1, 0, 1, 0]),
        "sum": helper.make_node("Add", ["turned", "branch"], ["summed"]),
        "back": helper.make_node("Transpose", ["summed"], ["by_frames"], perm=[0, 2, 1, 3]),
        "result": helper.make_node("Reshape", ["by_frames", "by_image"], ["y"]),
    }
    change(nodes)
    graph = helper.make_graph(
        list(nodes.values()),
        "half",
        [helper.make_tensor_value_info("x", kind, images)],
        [helper.make_tensor_value_info("y", kind, images)],
        constants,
        value_info=[helper.make_tensor_value_info("turned", kind, turned)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, check_type=True)


def split(model: onnx.ModelProto) -> onnx.ModelProto:
    read = ir.from_proto(model)
    split_turned_norms(read.graph)
    made = ir.to_proto(read)
    onnx.checker.check_model(made, full_check=True)
    return made


def exact(model: onnx.ModelProto, x: np.ndarray[Any, Any], videos: int) -> np.ndarray[Any, Any]:
    """torch's own, in float64."""
    scale, bias, kernel = (
        torch.from_numpy(onnx.numpy_helper.to_array(t).astype(np.float64))
        for t in list(model.graph.initializer)[:3]
    )
    images = torch.from_numpy(x.astype(np.float64))
    turned = images.flatten(2).unflatten(0, (videos, -1)).transpose(1, 2)
    normal = torch.nn.functional.group_norm(turned, GROUPS, scale, bias, EPSILON)
    branch = torch.nn.functional.conv2d(torch.nn.functional.silu(normal), kernel, padding=(1, 0))
    return (turned + branch).transpose(1, 2).reshape(images.shape).numpy()


@pytest.mark.parametrize(("kind", "allowed"), [(TensorProto.FLOAT, 1e-6), (TensorProto.FLOAT16, 1e-3)])
@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("mean", [0, 100])
def test_the_same_function(kind: int, allowed: float, videos: int, mean: float) -> None:
    """A mean of 100 and a deviation of 1, too: in float16 the sum of squares would overflow."""
    model = temporal_half(kind, videos, 3, 64, 4)
    made = split(model)
    assert not {"GroupNormalization", "InstanceNormalization"} & {node.op_type for node in made.graph.node}
    x = np.random.default_rng(1).normal(mean, 1, (videos * 3, 64, 4, 4)).astype(TYPES[kind])
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    got, expected = session.run(None, {"x": x})[0], exact(model, x, videos)
    assert np.abs(got - expected).max() <= allowed * np.abs(expected).max()


def rewire(name: str, *inputs: str) -> Change:
    def change(nodes: dict[str, onnx.NodeProto]) -> None:
        nodes[name].input[:] = inputs

    return change


def reread(nodes: dict[str, onnx.NodeProto]) -> None:
    """The sum is read twice."""
    nodes["again"] = helper.make_node("Identity", ["summed"], ["more"])


@pytest.mark.parametrize(
    "change",
    [rewire("sum", "normal", "branch"), reread, rewire("norm", "turned_too", "scale", "bias")],
    ids=["a sum of something else", "a sum that is read twice", "a normalisation of something else"],
)
def test_other_halves_stay(change: Change) -> None:
    def with_another_turn(nodes: dict[str, onnx.NodeProto]) -> None:
        others = {name: nodes.pop(name) for name in list(nodes) if name not in ("view", "turn")}
        nodes["other"] = helper.make_node("Transpose", ["viewed"], ["turned_too"], perm=[0, 2, 1, 3])
        nodes.update(others)
        change(nodes)

    model = temporal_half(TensorProto.FLOAT16, 1, 3, 64, 4, with_another_turn)
    made = split(model)
    kinds = [node.op_type for node in made.graph.node]
    assert "GroupNormalization" in kinds
    assert "ReduceMean" not in kinds


def test_the_decoder_of_a_bundle(half_bundle: Path) -> None:
    """One normalisation of each of its temporal halves; no other network has any apart."""
    for entry in Bundle(half_bundle).manifest.networks:
        path = Bundle(half_bundle).graph(entry.spec, "tensorrt")
        kinds = [n.op_type for n in onnx.load(str(path), load_external_data=False).graph.node]
        halves = 5 if entry.spec.network == "vae_decoder" else 0
        assert kinds.count("ReduceMean") == 4 * halves, entry.spec.key


def between_convolutions(nodes: dict[str, onnx.NodeProto]) -> None:
    """As in the decoder, where the images are not the graph's own input and output."""
    nodes["view"].input[0], nodes["result"].output[0] = "images", "mixed"
    half = {name: nodes.pop(name) for name in list(nodes)}
    nodes["before"] = helper.make_node("Conv", ["x", "square"], ["images"], pads=[1, 1, 1, 1])
    nodes.update(half)
    nodes["after"] = helper.make_node("Conv", ["mixed", "square"], ["y"], pads=[1, 1, 1, 1])


def test_the_compiler_moves_less(tmp_path: Path) -> None:
    """One tensor of the images less; of fewer groups, or for a graph's own input, it moves more."""
    model = temporal_half(TensorProto.FLOAT16, 1, 8, 128, 64, between_convolutions)
    tensor, moved = 2 * 8 * 128 * 64 * 64, []
    for name, graph in (("before", model), ("after", split(model))):
        path = tmp_path / f"{name}.onnx"
        onnx.save(graph, str(path))
        figures = compile_graph(path, "sm89").figures()
        moved.append((figures.read_bytes + figures.written_bytes) / tensor)
    assert moved[0] - moved[1] == pytest.approx(1, abs=0.1)
