"""The graphs of a network: the same numbers, and what each is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from svd_engine.bundle.manifest import Runtime
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import ExportError
from svd_engine.networks.parity import example_inputs, tolerance
from svd_engine.networks.rewrites import rewrites_for
from svd_export import forms
from svd_export.compiled import compile_graph
from svd_export.graph_check import check_graph
from svd_export.primitives import take_apart

TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
TAKEN_APART = {
    "Attention": ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"],
    "GroupNormalization": ["Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"],
}


def one_node(op: str, kind: int, attributes: dict[str, Any], **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A graph of one operator; `scale` and `bias` are constants, as in every exported graph."""
    random = np.random.default_rng(0)
    constants = [
        onnx.numpy_helper.from_array((1 + random.normal(size=shape)).astype(TYPES[kind]), name)
        for name, shape in shapes.items()
        if name in ("scale", "bias")
    ]
    inputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, shape in shapes.items()
        if name not in ("scale", "bias")
    ]
    output = helper.make_tensor_value_info("y", kind, next(iter(shapes.values())))
    node = helper.make_node(op, list(shapes), ["y"], **attributes)
    graph = helper.make_graph([node], "one", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def taken_apart(model: onnx.ModelProto) -> onnx.ModelProto:
    read = ir.from_proto(model)
    take_apart(read.graph, [node for node in read.graph if node.op_type in TAKEN_APART])
    read.graph.opset_imports[""] = 20
    made = ir.to_proto(read)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model: onnx.ModelProto, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0], np.float64)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Cast"]


def softmax_of(q: Any, k: Any, v: Any) -> Any:
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v.astype(np.float64)


@pytest.mark.parametrize(("kind", "allowed"), [(TensorProto.FLOAT, 1e-5), (TensorProto.FLOAT16, 4e-3)])
def test_attention(kind: int, allowed: float) -> None:
    shape = (2, 3, 7, 64)
    random = np.random.default_rng(1)
    inputs = {name: random.normal(size=shape).astype(TYPES[kind]) for name in "qkv"}
    model = one_node("Attention", kind, {"softmax_precision": 1}, q=shape, k=shape, v=shape)
    apart = taken_apart(model)
    assert operators(apart) == TAKEN_APART["Attention"]
    expected = softmax_of(**inputs)
    assert np.abs(run(apart, **inputs) - expected).max() < allowed
    assert np.abs(run(model, **inputs) - expected).max() < allowed


def test_a_scale_of_its_own() -> None:
    shape = (1, 2, 3, 16)
    inputs = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name in "qkv"}
    model = taken_apart(one_node("Attention", TensorProto.FLOAT, {"scale": 0.5}, q=shape, k=shape, v=shape))
    expected = softmax_of(inputs["q"] * 2, inputs["k"], inputs["v"])  # of 0.25, the default at this width
    assert np.abs(run(model, **inputs) - expected).max() < 1e-5


def test_products_of_large_keys_do_not_overflow() -> None:
    """Their product is 90,000 before the scale, and float16 ends at 65,504."""
    shape = (1, 1, 2, 64)
    inputs = {name: np.full(shape, 37.5, np.float16) for name in "qkv"}
    model = taken_apart(one_node("Attention", TensorProto.FLOAT16, {}, q=shape, k=shape, v=shape))
    assert (run(model, **inputs) == 37.5).all()


@pytest.mark.parametrize(("kind", "allowed"), [(TensorProto.FLOAT, 1e-5), (TensorProto.FLOAT16, 1e-2)])
@pytest.mark.parametrize("rest", [(5, 6), (10,)])
def test_group_normalization(kind: int, allowed: float, rest: tuple[int, ...]) -> None:
    """A mean of 100 and a deviation of 1: in float16 the sum of squares would overflow."""
    shape = (2, 32, *rest)
    x = np.random.default_rng(1).normal(100, 1, shape).astype(TYPES[kind])
    attributes = {"num_groups": 8, "epsilon": 1e-5}
    model = one_node("GroupNormalization", kind, attributes, x=shape, scale=(32,), bias=(32,))
    apart = taken_apart(model)
    assert operators(apart) == TAKEN_APART["GroupNormalization"]
    assert {tensor.name for tensor in apart.graph.initializer} & {"scale", "bias"} == set()
    scale, bias = (onnx.numpy_helper.to_array(t) for t in model.graph.initializer)
    exact = [torch.from_numpy(array.astype(np.float64)) for array in (x, scale, bias)]
    expected = torch.nn.functional.group_norm(exact[0], 8, *exact[1:], eps=1e-5).numpy()
    assert np.abs(run(apart, x=x) - expected).max() < allowed * np.abs(expected).max()


def graphs(folder: Path, runtime: Runtime) -> dict[str, onnx.ModelProto]:
    """By network."""
    bundle = Bundle(folder)
    return {
        entry.spec.network: onnx.load(str(bundle.graph(entry.spec, runtime)), load_external_data=False)
        for entry in bundle.manifest.networks
    }


def test_the_manifest_says_which_graph_is_for_whom(half_bundle: Path, tiny_bundle: Path) -> None:
    for entry in Bundle(half_bundle).manifest.networks:
        assert entry.graphs == {
            "onnxruntime": f"{entry.spec.key}.onnx",
            "tensorrt": f"{entry.spec.key}.tensorrt.onnx",
        }
    for entry in Bundle(tiny_bundle).manifest.networks:  # float32
        assert entry.graphs == {"onnxruntime": f"{entry.spec.key}.onnx"}


@pytest.mark.parametrize("bundle", ["half_bundle", "brain_bundle"])
def test_both_graphs_refer_to_the_same_weights(bundle: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(bundle)
    for entry in Bundle(folder).manifest.networks:
        places: dict[str, set[tuple[str, str, str]]] = {}
        for runtime, file in entry.graphs.items():
            model = onnx.load(str(folder / file), load_external_data=False)
            assert [(item.domain, item.version) for item in model.opset_import] == [("", forms.OPSET)]
            places[runtime] = {
                tuple(item.value for item in tensor.external_data)[:3]
                for tensor in model.graph.initializer
                if tensor.external_data
            }
            assert {location for location, *_ in places[runtime]} == {entry.weights}
            assert (folder / file).stat().st_size < 2**20
        assert places["onnxruntime"] == places["tensorrt"]


def test_what_the_graphs_differ_in(half_bundle: Path) -> None:
    """Group normalisation is apart for one, attention without a kernel for the other; nothing else,
    but in the decoder, whose temporal halves `test_turned_norms` has."""
    tensorrt, ort = graphs(half_bundle, "tensorrt"), graphs(half_bundle, "onnxruntime")
    for network, model in tensorrt.items():
        if network in forms.TURNED:
            continue
        counts, expected = Counter(operators(ort[network])), Counter(operators(model))
        products = expected["Softmax"]  # every one is an Attention taken apart
        expected += Counter(TAKEN_APART["GroupNormalization"] * expected.pop("GroupNormalization", 0))
        for op in TAKEN_APART["Attention"]:
            expected[op] -= products
        expected["Attention"] += products
        assert +expected == counts
    assert [operators(tensorrt[network]).count("Softmax") for network in tensorrt] == [
        2,
        1,
        0,
        0,
    ]  # heads 8 wide; float32
    assert "GroupNormalization" not in operators(ort["denoiser"])
    assert "GroupNormalization" in operators(tensorrt["denoiser"])


@pytest.mark.parametrize(("width", "dtype", "fused"), [
    (256, ir.DataType.FLOAT16, True), (9, ir.DataType.FLOAT16, True), (64, ir.DataType.BFLOAT16, True),
    (257, ir.DataType.FLOAT16, False), (8, ir.DataType.FLOAT16, False), (64, ir.DataType.FLOAT, False),
])  # fmt: skip
def test_which_attention_stays_an_operator(width: int, dtype: ir.DataType, fused: bool) -> None:
    q = ir.Value(name="q", type=ir.TensorType(dtype), shape=ir.Shape((1, 1, 8, width)))
    assert forms.fuses(ir.node("Attention", [q, q, q])) == fused


def test_the_shape_follows_the_type(tiny_bundle: Path, half_bundle: Path) -> None:
    """float32 is what runs on a CPU: its rewrites are those of a CPU."""
    for folder, dtype in ((tiny_bundle, torch.float32), (half_bundle, torch.float16)):
        manifest = Bundle(folder).manifest
        assert manifest.opset == forms.OPSET
        names = [rewrite.name for rewrite in rewrites_for("onnxruntime", forms.device_of(dtype))]
        assert list(dict.fromkeys(entry.name for entry in manifest.rewrites)) == names


def test_the_islands_of_float32(half_bundle: Path) -> None:
    islands: Counter[str] = Counter()
    for runtime in forms.RUNTIMES:
        for model in graphs(half_bundle, runtime).values():
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
            types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
            for node in inferred.node:
                if node.op_type in ("Softmax", "InstanceNormalization"):
                    assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
                    islands[node.op_type] += 1
    assert islands["InstanceNormalization"] > 5
    assert islands["Softmax"] == 3


def test_both_graphs_give_the_same_numbers(half_bundle: Path) -> None:
    """ONNX Runtime runs TensorRT's graph too, by the operators' definitions."""
    bundle = Bundle(half_bundle)
    for entry in bundle.manifest.networks:
        inputs = {name: tensor.numpy() for name, tensor in example_inputs(entry.spec).items()}
        ours, theirs = (
            runtime_session(bundle.graph(entry.spec, runtime)).run(None, inputs)[0]
            for runtime in forms.RUNTIMES
        )
        assert np.abs(ours - theirs).max() <= tolerance(entry.spec) * np.abs(ours).max()


def runtime_session(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_what_tensorrt_does_not_take_is_not_said(half_bundle: Path) -> None:
    for name, expected in (("tensorrt", {"scale"}), ("onnxruntime", {"scale", "softmax_precision"})):
        nodes = [n for m in graphs(half_bundle, name).values() for n in m.graph.node]  # type: ignore[arg-type]
        attributes = {a.name for n in nodes if n.op_type == "Attention" for a in n.attribute}
        assert attributes <= expected


@pytest.mark.parametrize(
    ("bundle", "target"),
    [("half_bundle", "sm75"), ("half_bundle", "sm89"), ("brain_bundle", "sm75"), ("brain_bundle", "sm120")],
)
def test_the_real_compiler_takes_every_network(
    bundle: str, target: str, request: pytest.FixtureRequest
) -> None:
    """Turing has no bfloat16: of such a bundle, only what computes in float32."""
    opened = Bundle(request.getfixturevalue(bundle))
    for entry in opened.manifest.networks:
        graph = opened.graph(entry.spec, "tensorrt")
        if (bundle, target) == ("brain_bundle", "sm75") and entry.spec.network != "vae_encoder":
            assert check_graph(graph, "11", target).findings != ()
            with pytest.raises(ExportError, match="HW-specific datatypes: b16"):
                compile_graph(graph, target)
        else:
            found = check_graph(graph, "11", target)
            assert found.findings == ()
            assert compile_graph(graph, target).fused_attentions == sum(found.fused.values())
