"""What a graph takes, gives and allocates is known before it runs; graphs that ask for much are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from svd_engine.bundle import external_data
from svd_engine.bundle.external_data import read_graph
from svd_engine.bundle.graph_limits import CONSTANT_BYTES, check_limits, peak_bytes
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BundleError
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tensors import NetworkSpec, TensorSpec
from tests.support import damage
from tests.support.messages import complete

SPEC = NetworkSpec("toy", "toy-b1", (TensorSpec("x", (1, 4)),), (TensorSpec("y", (1, 4)),), FLOAT32)
GIB = 2**30
Nodes = list[onnx.NodeProto]


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(nodes: Nodes, initializers: list[onnx.TensorProto] | None = None, **graph: Any) -> onnx.ModelProto:
    """x [1, 4] -> y [1, 4] by way of `nodes`, which leave their result in `z`."""
    nodes = [*nodes, helper.make_node("Identity", ["x"], ["y"])]
    whole = helper.make_graph(
        nodes, "toy", [value("x", 1, 4)], [value("y", 1, 4)], initializers or [], **graph
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)])


def check(graph: onnx.ModelProto, memory: int | None = None, spec: NetworkSpec = SPEC) -> None:
    check_limits(Path("toy.onnx"), graph, spec, 1000, memory)


def of_shape(*shape: int) -> onnx.ModelProto:
    return model([helper.make_node("ConstantOfShape", ["shape"], ["z"])], [ints("shape", *shape)])


def test_an_ordinary_graph_is_taken() -> None:
    check(of_shape(4, 4), memory=GIB)


FAR = 40_000_000_000  # elements: 160 GB of float32
BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "ConstantOfShape": lambda: of_shape(FAR),
    "ConstantOfShape of two axes": lambda: of_shape(200_000, 200_000),
    "many that are each in bounds": lambda: model(
        [helper.make_node("ConstantOfShape", ["shape"], [f"z{i}"]) for i in range(20)],
        [ints("shape", 100, 1_000_000)],
    ),
    "Expand": lambda: model(
        [helper.make_node("Expand", ["one", "shape"], ["z"])], [ints("one", 1), ints("shape", FAR)]
    ),
    "Tile": lambda: model(
        [helper.make_node("Tile", ["one", "repeats"], ["z"])], [ints("one", 1), ints("repeats", FAR)]
    ),
    "Range": lambda: model(
        [helper.make_node("Range", ["zero", "end", "step"], ["z"])],
        [numpy_helper.from_array(np.int64(v), n) for n, v in (("zero", 0), ("end", FAR), ("step", 1))],
    ),
    "a chain": lambda: model(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["z0"]),
            *(helper.make_node("Concat", [f"z{i}"] * 10, [f"z{i + 1}"], axis=0) for i in range(8)),
        ],
        [ints("shape", 100)],
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_large_constant_is_refused_on_any_device(name: str) -> None:
    graph = BOMBS[name]()
    assert len(graph.SerializeToString()) < 10_000
    with pytest.raises(BundleError) as caught:
        check(graph)
    complete(caught.value, "Do not run this bundle")


def test_what_follows_from_the_input_is_held_against_the_device() -> None:
    graph = model(
        [
            helper.make_node("Expand", ["x", "shape"], ["z"]),
            helper.make_node("Neg", ["z"], ["w"]),
        ],
        [ints("shape", FAR // 4, 4)],
    )
    check(graph)
    check(graph, memory=200 * GIB)
    with pytest.raises(BundleError) as caught:
        check(graph, memory=100 * GIB)
    complete(caught.value, f"at least {4 * FAR + 16:,} bytes", "more memory")


def nodes(*rows: tuple[str, str, str]) -> onnx.GraphProto:
    made = [helper.make_node(op, inputs.split(), outputs.split()) for op, inputs, outputs in rows]
    return helper.make_graph(made, "g", [value("x", 1)], [value("y", 1)])


@pytest.mark.parametrize(
    ("graph", "peak"),
    [
        (nodes(("Neg", "x", "a"), ("Neg", "a", "y")), 10),  # in place, one after the other
        (nodes(("Neg", "x", "a"), ("Neg", "x", "b"), ("Add", "a b", "y")), 20),
        (nodes(("Reshape", "x s", "a"), ("Add", "a x", "y")), 10),  # a view of x
        (nodes(("Neg", "x", "a"), ("Reshape", "a s", "b"), ("Neg", "x", "c"), ("Add", "b c", "y")), 20),
        (nodes(("Neg", "x", "unread"), ("Neg", "x", "y")), 10),
    ],
)
def test_the_peak_counts_what_is_still_read(graph: onnx.GraphProto, peak: int) -> None:
    sizes = dict.fromkeys(["x", "y", "a", "b", "c", "unread"], 10)
    assert peak_bytes(graph, sizes) == peak


def branching() -> onnx.ModelProto:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["w"])], "body", [], [value("w", 1, 4)])
    condition = numpy_helper.from_array(np.array(True), "yes")
    return model([helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body)], [condition])


def calling() -> onnx.ModelProto:
    graph = model([])
    graph.functions.append(onnx.FunctionProto(name="f", domain="local"))
    return graph


def sparse() -> onnx.ModelProto:
    tensor = onnx.SparseTensorProto(
        values=numpy_helper.from_array(np.ones(1, np.float32), "z"), indices=ints("i", 0), dims=[FAR]
    )
    return model([], sparse_initializer=[tensor])


def untrue() -> onnx.ModelProto:
    """The graph states a shape of 4 for what only a run could know: nothing that it states is believed."""
    graph = dynamic()
    graph.graph.value_info.append(value("z", 4))
    return graph


def normalising() -> onnx.ModelProto:
    """Of GroupNormalization onnx infers nothing: the statement is believed, if it is its input's size."""
    scale = numpy_helper.from_array(np.ones(4, np.float32), "one")
    node = helper.make_node("GroupNormalization", ["x", "one", "one"], ["z"], num_groups=2)
    graph = model([node], [scale])
    graph.graph.value_info.append(value("z", 1, 2))
    return graph


def dynamic() -> onnx.ModelProto:
    return model([helper.make_node("NonZero", ["x"], ["z"])])


def unknown() -> onnx.ModelProto:
    graph = model([helper.make_node("Bomb", ["x"], ["z"], domain="elsewhere")])
    graph.opset_import.append(helper.make_opsetid("elsewhere", 1))
    return graph


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (branching, "a graph inside If"),
        (calling, "a function 'f'"),
        (sparse, "a sparse tensor 'z'"),
        (untrue, "expected static shapes of every tensor, got none of 'z'"),
        (normalising, "got z"),
        (dynamic, "expected static shapes of every tensor, got none of 'z'"),
        (unknown, "expected static shapes of every tensor, got none of 'z'"),
    ],
)
def test_what_cannot_be_known_is_refused(make: Callable[[], onnx.ModelProto], got: str) -> None:
    with pytest.raises(BundleError) as caught:
        check(make())
    complete(caught.value, got)


def test_weights_elsewhere_are_no_constants_of_the_graph() -> None:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[CONSTANT_BYTES], data_location=1)
    weight.external_data.add(key="location", value="toy.bin")
    check(model([], [weight]))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((TensorSpec("pixels", (1, 4)),), SPEC.outputs),
        ((TensorSpec("x", (1, 5)),), SPEC.outputs),
        ((TensorSpec("x", (1, 4), "float16"),), SPEC.outputs),
        ((*SPEC.inputs, TensorSpec("sigma", ())), SPEC.outputs),
        (SPEC.inputs, (TensorSpec("z", (1, 4)),)),
        (SPEC.inputs, (TensorSpec("y", (4,)),)),
        (SPEC.inputs, (*SPEC.outputs, TensorSpec("z", (1, 4)))),
    ],
)
def test_another_table_is_refused(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    with pytest.raises(BundleError) as caught:
        check(model([]), spec=NetworkSpec("toy", "toy-b1", inputs, outputs, FLOAT32))
    complete(caught.value, "got x float32 [1, 4] -> y float32 [1, 4]")


def test_a_graph_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(model([]), tmp_path / "toy.onnx")
    read_graph(tmp_path / "toy.onnx")
    monkeypatch.setattr(external_data, "GRAPH_BYTES", 50)
    with pytest.raises(BundleError) as caught:
        read_graph(tmp_path / "toy.onnx")
    complete(caught.value, "at most 50 bytes")


def test_the_graph_of_another_network_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """Hash and size agree: the decoder's graph and weights under the VAE encoder's names."""
    bundle = damage.copy(tiny_bundle, tmp_path)
    encoder, decoder = (damage.network(bundle, name) for name in ("vae_encoder", "vae_decoder"))

    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["networks"]:
            if entry["spec"]["key"] == encoder["spec"]["key"]:
                entry.update(graphs=decoder["graphs"], weights=decoder["weights"])

    damage.edit(bundle, change)
    opened = Bundle(bundle)
    spec = next(e.spec for e in opened.manifest.networks if e.spec.network == "vae_encoder")
    with pytest.raises(BundleError, match=r"expected pixels float32 .* got latent float32 .*Do not run"):
        opened.graph(spec, "onnxruntime")
