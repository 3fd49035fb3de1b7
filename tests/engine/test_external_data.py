"""A graph whose weights lie elsewhere is refused, wherever the graph hides the path.

Sizes and hashes of the crafted bundles agree with their manifests: only the paths are wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, BundleError
from svd_engine.spec.tensors import NetworkSpec
from tests.support import damage

SECRET = "../secret.bin"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    (tmp_path / "secret.bin").write_bytes(b"\1\2\3\4" * 4096)
    return damage.copy(tiny_bundle, tmp_path)


def encoder(folder: Path) -> NetworkSpec:
    bundle = Bundle(folder)
    return bundle.specs_of(bundle.manifest.profiles[0])[0]


def rewrite(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    name = damage.network(folder, "image_encoder")["graphs"]["onnxruntime"]
    model = onnx.load(str(folder / name), load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    damage.trust(folder, name)


def external(*locations: str) -> TensorProto:
    tensor = TensorProto(name="stolen", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for location in locations:
        tensor.external_data.add(key="location", value=location)
    return tensor


def tensor_of(location: str) -> Callable[[onnx.ModelProto], None]:
    """Moves one of the real weights to another file."""

    def change(model: onnx.ModelProto) -> None:
        moved = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
        next(item for item in moved.external_data if item.key == "location").value = location

    return change


def constant() -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["unused"], value=external(SECRET))


def branch(*, initializer: bool) -> onnx.GraphProto:
    tensors = [external(SECRET)] if initializer else []
    nodes = [] if initializer else [constant()]
    output = helper.make_tensor_value_info("stolen" if initializer else "unused", TensorProto.FLOAT, [4])
    return helper.make_graph(nodes, "branch", [], [output], initializer=tensors)


def sparse() -> onnx.SparseTensorProto:
    indices = helper.make_tensor("indices", TensorProto.INT64, [4], [0, 1, 2, 3])
    return onnx.SparseTensorProto(values=external(SECRET), indices=indices, dims=[8])


def choice(*, initializer: bool) -> onnx.NodeProto:
    one = branch(initializer=initializer)
    return helper.make_node("If", ["condition"], ["unused"], then_branch=one, else_branch=one)


HIDDEN: dict[str, Callable[[onnx.ModelProto], None]] = {
    "beside the bundle": tensor_of(SECRET),
    "an absolute path": tensor_of("/etc/hostname"),
    "another file of the bundle": tensor_of("denoiser.bin"),
    "the same file by a path": tensor_of("./image_encoder.bin"),
    "a folder": tensor_of("."),
    "no path": tensor_of(""),
    "memory of the process": tensor_of("*/_ORT_MEM_ADDR_/*"),
    "two paths": lambda m: m.graph.initializer.append(external(SECRET, "image_encoder.bin")),
    "no location": lambda m: m.graph.initializer.append(external()),
    "an attribute": lambda m: m.graph.node.append(constant()),
    "a list in an attribute": lambda m: m.graph.node.append(
        helper.make_node("Custom", [], ["unused"], tensors=[external(SECRET)])
    ),
    "a subgraph": lambda m: m.graph.node.append(choice(initializer=True)),
    "an attribute in a subgraph": lambda m: m.graph.node.append(choice(initializer=False)),
    "a function": lambda m: m.functions.append(
        onnx.FunctionProto(name="f", domain="local", node=[choice(initializer=True)])
    ),
    "a sparse initializer": lambda m: m.graph.sparse_initializer.append(sparse()),
    "a sparse attribute": lambda m: m.graph.node.append(
        helper.make_node("Constant", [], ["unused"], sparse_value=sparse())
    ),
    "a training graph": lambda m: m.training_info.append(
        onnx.TrainingInfoProto(algorithm=branch(initializer=True))
    ),
}


@pytest.mark.parametrize("change", HIDDEN.values(), ids=HIDDEN)
def test_weights_elsewhere_are_refused(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    rewrite(bundle, change)
    opened = Bundle(bundle)
    opened.check_hashes()  # nothing else is wrong with it
    with pytest.raises(
        BundleError, match=r"expected weights in image_encoder\.bin, got a path to .*Do not run"
    ):
        OrtBackend(opened, torch.device("cpu")).open(encoder(bundle))


def test_an_unchanged_graph_written_again_is_taken(bundle: Path) -> None:
    rewrite(bundle, lambda model: None)
    Bundle(bundle).graph(encoder(bundle), "onnxruntime")


@pytest.mark.parametrize("content", [b"not a graph", b"\x08"])
def test_a_graph_that_is_no_onnx_model(bundle: Path, content: bytes) -> None:
    name = damage.network(bundle, "image_encoder")["graphs"]["onnxruntime"]
    (bundle / name).write_bytes(content)
    damage.trust(bundle, name)
    with pytest.raises(BundleError, match=r"expected an ONNX model, got .*Export the bundle again"):
        Bundle(bundle).graph(encoder(bundle), "onnxruntime")


def test_without_onnx_nothing_is_loaded_unchecked(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, spec = Bundle(tiny_bundle), encoder(tiny_bundle)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendUnavailable, match=r"the package onnx, got none installed. Run: pip install"):
        opened.graph(spec, "onnxruntime")
