"""The forms of a graph: the same numbers, and what each is made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as runtime
import pytest
import torch
from onnx import TensorProto, helper

from svd_engine.bundle import Bundle
from svd_engine.checkpoint import open_checkpoint
from svd_engine.manifest import Form, Manifest
from svd_export import cli, forms
from svd_export.primitives import take_apart
from svd_export.verify import verify
from tests import damage
from tests.export.conftest import half

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
    take_apart(read.graph, TAKEN_APART)
    read.graph.opset_imports[""] = 20
    made = ir.to_proto(read)
    onnx.checker.check_model(made, full_check=True)
    return made


def run(model: onnx.ModelProto, **inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
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


@pytest.fixture(scope="module")
def primitive_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `half_bundle`, both operators taken apart."""
    return half(tiny_checkpoint, tmp_path_factory.mktemp("primitive") / "tiny", "primitives")


def graphs(folder: Path) -> dict[str, onnx.ModelProto]:
    entries = Bundle(folder).manifest.networks
    return {e.spec.key: onnx.load(str(folder / e.graph), load_external_data=False) for e in entries}


def test_the_options_are_the_forms() -> None:
    assert [option.value for option in cli.Form] == list(forms.OPSETS) == list(forms.APART)
    assert list(get_args(get_type_hints(Manifest)["form"])) == list(forms.OPSETS)


def test_the_manifest_and_every_graph_say_which(primitive_bundle: Path) -> None:
    manifest = Bundle(primitive_bundle).manifest
    assert (manifest.form, manifest.opset) == ("primitives", 20)
    for model in graphs(primitive_bundle).values():
        assert [(item.domain, item.version) for item in model.opset_import] == [("", 20)]


@pytest.fixture(scope="module")
def operator_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `half_bundle`, both operators whole."""
    return half(tiny_checkpoint, tmp_path_factory.mktemp("operator") / "tiny", "operators")


@pytest.mark.parametrize("form", ["attention", "primitives"])
def test_nothing_but_what_is_taken_apart_differs(
    form: Form, operator_bundle: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("half_bundle" if form == "attention" else "primitive_bundle")
    for key, whole in graphs(operator_bundle).items():
        counts, expected = Counter(operators(graphs(folder)[key])), Counter(operators(whole))
        for op in forms.APART[form]:
            expected += Counter(TAKEN_APART[op] * expected.pop(op, 0))
        assert counts == expected
        assert set(forms.APART[form]) & set(counts) == set()


def test_the_form_of_a_cpu_is_the_default_of_float32(tiny_bundle: Path, half_bundle: Path) -> None:
    for folder, form, dtype in ((tiny_bundle, "cpu", "float32"), (half_bundle, "attention", "float16")):
        manifest = Bundle(folder).manifest
        assert (manifest.form, manifest.opset, manifest.dtype) == (form, 23, dtype)
        names = [rewrite.name for rewrite in forms.rewrites_of(manifest.form)]
        assert list(dict.fromkeys(entry.name for entry in manifest.rewrites)) == names


@pytest.mark.parametrize(
    ("bundle", "kinds"),
    [("half_bundle", {"InstanceNormalization"}), ("primitive_bundle", {"InstanceNormalization", "Softmax"})],
)
def test_the_islands_of_float32(bundle: str, kinds: set[str], request: pytest.FixtureRequest) -> None:
    islands: Counter[str] = Counter()
    for model in graphs(request.getfixturevalue(bundle)).values():
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        for node in inferred.node:
            if node.op_type in ("Softmax", "InstanceNormalization"):
                assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
                islands[node.op_type] += 1
    assert islands.keys() == kinds
    assert min(islands.values()) > 5


def test_both_forms_pass_the_same_tolerances(
    primitive_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """`half_bundle` is held to them in test_verify.py."""
    bundle = Bundle(damage.copy(primitive_bundle, tmp_path))
    rows = verify(bundle, open_checkpoint(str(tiny_checkpoint)), torch.device("cpu"), lambda line: None)
    assert len(rows) == 4
    assert all(0 < row.relative <= row.tolerance for row in rows)


def test_the_default_of_attention_is_not_spelled_out(half_bundle: Path) -> None:
    """TensorRT's parser takes neither softcap nor qk_matmul_output_mode."""
    nodes = [
        n for model in graphs(half_bundle).values() for n in model.graph.node if n.op_type == "Attention"
    ]
    assert nodes
    assert {attribute.name for node in nodes for attribute in node.attribute} <= {
        "softmax_precision",
        "scale",
    }
