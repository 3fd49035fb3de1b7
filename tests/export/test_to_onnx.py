"""What an export writes: valid graphs, their tables and precision, shared weights, no trace of its maker."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, shape_inference
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor, nn
from torch.fx import config as tracing

from svd_engine import report
from svd_engine.bundle.manifest import MANIFEST, SCHEMA
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import ExportError
from svd_engine.networks.modules import Modules
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tensors import NetworkSpec, TensorSpec
from svd_export.to_onnx import check, trace
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support.paths import ROOT


def graphs(folder: Path, network: str = "") -> Iterator[tuple[NetworkSpec, onnx.ModelProto]]:
    for entry in Bundle(folder).manifest.networks:
        if network in ("", entry.spec.network):
            yield entry.spec, onnx.load(str(folder / entry.graphs["onnxruntime"]), load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Where each tensor outside the graph lies: location, offset, length."""
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    return {tensor.name: {item.key: item.value for item in tensor.external_data} for tensor in outside}


def boundary(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            value.name,
            tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim),
            {TensorProto.FLOAT: "float32"}[value.type.tensor_type.elem_type],
        )
        for value in values
    )


@pytest.mark.parametrize("bundle", ["tiny_bundle", "half_bundle"])
def test_graphs_are_valid_and_have_the_table_s_boundary(bundle: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(bundle)
    bundle_ = Bundle(folder)
    tables = {s.key: s for p in bundle_.manifest.profiles for s in bundle_.specs_of(p)}
    assert {spec.key for spec, _ in graphs(folder)} == tables.keys()
    for spec, model in graphs(folder):
        onnx.checker.check_model(str(folder / f"{spec.key}.onnx"), full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
        assert boundary(list(model.graph.input)) == tables[spec.key].inputs
        assert boundary(list(model.graph.output)) == tables[spec.key].outputs


def test_every_shape_inside_is_static(tiny_bundle: Path) -> None:
    for spec, model in graphs(tiny_bundle):
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        shapes = {v.name: v.type.tensor_type.shape.dim for v in inferred.graph.value_info}
        made = {name for node in model.graph.node for name in node.output}
        assert made <= shapes.keys() | {tensor.name for tensor in spec.outputs}
        assert all(dim.HasField("dim_value") for dims in shapes.values() for dim in dims)


def test_normalisation_and_softmax_stay_float32_in_a_float16_bundle(half_bundle: Path) -> None:
    """By attributes; InstanceNormalization has none, and test_forms.py looks at the casts around it."""
    kinds = {"LayerNormalization": "stash_type", "Attention": "softmax_precision"}
    found: Counter[str] = Counter()
    for _, model in graphs(half_bundle):
        for node in model.graph.node:
            assert node.op_type not in ("Softmax", "ReduceMean")  # taken apart
            if node.op_type in kinds:
                attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
                precision = attributes.get(kinds[node.op_type], 1 if "Norm" in node.op_type else None)
                assert precision == TensorProto.FLOAT, node.name
                found[node.op_type] += 1
    assert found.keys() == kinds.keys()


def test_what_is_float16_and_what_is_not(half_bundle: Path) -> None:
    """The VAE encoder overflows in half precision, so it alone is float32."""
    for spec, model in graphs(half_bundle):
        entry = Bundle(half_bundle).entry(spec)
        large = Counter(
            t.data_type for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL
        )
        wanted = TensorProto.FLOAT if spec.network == "vae_encoder" else TensorProto.FLOAT16
        assert large.keys() == {wanted}
        assert str(entry.spec.precision) == ("float32" if spec.network == "vae_encoder" else "float16")


def test_two_profiles_share_one_copy_of_the_weights(tiny_bundle: Path) -> None:
    (_, batched), (_, single) = graphs(tiny_bundle, "denoiser")
    one, other = external(batched), external(single)
    named = {name for name in one.keys() & other.keys() if name.startswith("unet.")}
    assert len(named) > 50
    assert {name: one[name] for name in named} == {name: other[name] for name in named}
    used, also_used = ({place["offset"] for place in places.values()} for places in (one, other))
    assert len(used & also_used) > 0.97 * len(used)  # what differs is made for the batch
    assert {place["location"] for place in (*one.values(), *other.values())} == {"denoiser.bin"}
    alone = max(int(place["offset"]) + int(place["length"]) for place in one.values())
    assert (tiny_bundle / "denoiser.bin").stat().st_size < 1.05 * alone


def test_the_file_holds_the_checkpoint_s_own_numbers(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    """As onnx reads them at the graph's offsets, which are those of pages."""
    spec, model = next(graphs(tiny_bundle, "vae_encoder"))
    module = Modules(open_checkpoint(str(tiny_checkpoint))).network(spec)
    assert all(int(place["offset"]) % 4096 == 0 for place in external(model).values())
    outside = {t.name: t for t in model.graph.initializer if t.name in external(model)}
    named = {name: weight for name, weight in module.state_dict().items() if name in outside}
    assert len(named) > 0.7 * len(outside)  # others were transposed or joined
    for name, weight in named.items():
        load_external_data_for_tensor(outside[name], str(tiny_bundle))
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(outside[name]), weight.numpy())


@pytest.mark.parametrize("bundle", ["tiny_bundle", "half_bundle"])
def test_no_trace_of_the_exporting_machine(bundle: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(bundle)
    places = {str(ROOT), str(Path.cwd()), str(Path.home()), "site-packages"} - {"/"}
    for path in folder.iterdir():
        traces = places if path.suffix == ".bin" else {*places, ".py", "Traceback", "stack_trace"}
        content = path.read_bytes()
        assert [trace for trace in traces if trace.encode() in content] == [], path.name
    for _, model in graphs(folder):
        parts = (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer)
        assert not any(part.doc_string or len(part.metadata_props) for part in parts)


def test_the_manifest(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    manifest = Bundle(tiny_bundle).manifest
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    assert manifest.model == checkpoint.model
    assert (manifest.source.checkpoint, manifest.source.digest) == (str(tiny_checkpoint), checkpoint.digest())
    assert (manifest.format, manifest.precision, manifest.opset) == (3, FLOAT32, 23)
    assert [p.guidance for p in manifest.profiles] == ["batched", "single"]
    assert {(p.frames, p.height, p.width, p.decode_chunk) for p in manifest.profiles} == {
        (FRAMES, HEIGHT, WIDTH, CHUNK)
    }
    assert manifest.versions == report.versions()
    assert manifest.parity == ()
    applied = {(r.network, r.name): r.places for r in manifest.rewrites}
    assert applied["unet", "single-token-cross-attention"] == 8
    assert {network for network, _ in applied} == {"unet", "vae"}


def test_the_manifest_lists_every_file(tiny_bundle: Path) -> None:
    files = Bundle(tiny_bundle).manifest.files
    assert {path.name for path in tiny_bundle.iterdir()} == files.keys() | {MANIFEST, SCHEMA}
    for name, entry in files.items():
        content = (tiny_bundle / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


class Plain(nn.Module):
    def __init__(self, seen: list[bool]) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(tracing.do_not_emit_stack_traces)
        return pixels + 1


def test_torch_notes_no_stack_traces_while_it_traces() -> None:
    """A host program's own traces are as before."""
    seen: list[bool] = []
    trace(Plain(seen), TOY)
    assert set(seen) == {True}
    assert tracing.do_not_emit_stack_traces is False


class Undecided(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels if float(pixels.sum()) > 0 else -pixels


TOY = NetworkSpec("toy", "toy-b1", (TensorSpec("pixels", (1, 3)),), (TensorSpec("out", (1, 3)),), FLOAT32)


def test_a_network_that_cannot_be_traced() -> None:
    with pytest.raises(ExportError) as caught:
        trace(Undecided(), TOY)
    message = str(caught.value)
    assert "network toy-b1: expected a module that torch.onnx.export can trace, got " in message
    assert "Could not" in caught.value.got  # torch's own words, not the exporter's advice
    assert "\n" not in message
    assert "constraints.txt" in caught.value.remedy


def test_a_graph_that_onnx_refuses(tiny_bundle: Path, tmp_path: Path) -> None:
    _, model = next(graphs(tiny_bundle, "image_encoder"))
    model.graph.node[0].op_type = "NoSuchOperator"
    broken = tmp_path / "broken.onnx"
    (tmp_path / "image_encoder.bin").write_bytes((tiny_bundle / "image_encoder.bin").read_bytes())
    broken.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError) as caught:
        check(broken)
    assert "graph broken.onnx: expected a model that onnx's checker accepts, got " in str(caught.value)
    assert "NoSuchOperator" in caught.value.got
    assert "versions of torch, onnx and onnxscript" in caught.value.remedy
