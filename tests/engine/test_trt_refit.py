"""Stripped plans get their weights from the bundle's one file of weights, or are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from svd_engine.backends.tensorrt.network import TrtBackend, TrtNetwork
from svd_engine.backends.tensorrt.refit import graph_weights
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BundleError
from svd_engine.networks.parity import example_inputs
from tests.support import damage, tensorrt_double
from tests.support.tensorrt_double import Fault, TensorRT
from tests.support.tensorrt_plans import add_plan, denoiser, plan_of, specs, weight_types

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    return damage.copy(tiny_half_bundle, tmp_path)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    double = tensorrt_double.install(monkeypatch)
    double.compute = lambda key, inputs: {"denoised": torch.ones(inputs["x"].shape)}
    return double


def strip(folder: Path, **changed: str) -> dict[str, str]:
    """Adds a stripped plan of the denoiser; `changed` are types of weights that it takes for others."""
    spec = denoiser(folder)
    weights = weight_types(Bundle(folder).graph(spec, "tensorrt")) | changed
    add_plan(folder, spec, plan_of(spec, weights=weights))
    return weights


def refusal(folder: Path) -> BackendError:
    with pytest.raises(BackendError) as caught:
        TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert caught.value.remedy == f"Run: svd-export tensorrt {folder} --flavour tensorrt"
    return caught.value


def test_every_weight_is_what_onnx_reads(folder: Path, trt: TensorRT) -> None:
    weights = strip(folder)
    network = TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert isinstance(network, TrtNetwork)
    given = network.engine.weights  # of the double
    model = onnx.load(str(Bundle(folder).graph(denoiser(folder), "tensorrt")))  # external data included
    expected = {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    assert len(expected) > 100
    assert {name: given[name] for name in expected} == expected
    assert given.keys() == weights.keys()
    order = [name for name in trt.order() if name.startswith(("Refitter", "ICudaEngine"))]
    assert order[0] == "Refitter.__init__"
    assert order[-3:] == [
        "Refitter.refit_cuda_engine",
        "Refitter.freed",
        "ICudaEngine.create_execution_context",
    ]
    network(**example_inputs(network.spec))


def test_plans_of_two_profiles_share_the_weights(folder: Path, trt: TensorRT) -> None:
    batched, single = (spec for spec in specs(folder) if spec.network == "denoiser")
    backend = TrtBackend(Bundle(folder), CPU)
    for spec in (batched, single):
        add_plan(folder, spec, plan_of(spec, weights=weight_types(Bundle(folder).graph(spec, "tensorrt"))))
    backend = TrtBackend(Bundle(folder), CPU)
    assert len({Bundle(folder).entry(backend.open(spec).spec).weights for spec in (batched, single)}) == 1
    assert trt.called("Refitter.__init__") == [(batched.key,), (single.key,)]


def test_only_weights_that_the_engine_has_are_given(folder: Path, trt: TensorRT) -> None:
    """A constant that the builder folded away is none of its weights, and TensorRT would refuse it."""
    spec = denoiser(folder)
    some = dict(list(weight_types(Bundle(folder).graph(spec, "tensorrt")).items())[::2])
    add_plan(folder, spec, plan_of(spec, weights=some))
    TrtBackend(Bundle(folder), CPU).open(spec)
    assert [name for name, *_ in trt.called("Refitter.set_named_weights")] == list(some)


def test_a_plan_with_its_weights_is_not_refitted(folder: Path, trt: TensorRT) -> None:
    add_plan(folder, denoiser(folder))
    TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert not [name for name in trt.order() if name.startswith("Refitter")]


def test_a_weight_that_the_graph_lacks(folder: Path, trt: TensorRT) -> None:
    strip(folder, **{"of another graph": "FLOAT"})
    error = refusal(folder)
    plan, graph = (
        Bundle(folder).manifest.plans[0].file,
        damage.network(folder, "denoiser")["graphs"]["tensorrt"],
    )
    assert f"refitting {plan} from {graph}: expected all of its weights" in str(error)
    assert error.got == "of another graph (missing); no word from TensorRT's log"
    assert trt.called("Refitter.refit_cuda_engine") == []


def test_a_weight_of_another_type(folder: Path, trt: TensorRT) -> None:
    name = next(iter(weight_types(Bundle(folder).graph(denoiser(folder), "tensorrt"))))
    strip(folder, **{name: "BF16"})
    assert refusal(folder).got.startswith(f"{name} (refused); {name} (missing)")


def test_tensorrt_refuses_the_weights(folder: Path, trt: TensorRT) -> None:
    strip(folder)
    trt.faults["Refitter.refit_cuda_engine"] = Fault(returns=False, says="Error Code 3: validation failed")
    assert refusal(folder).got == "Error Code 3: validation failed"
    assert trt.called("ICudaEngine.create_execution_context") == []


def test_an_engine_that_cannot_be_refitted(folder: Path, trt: TensorRT) -> None:
    strip(folder)
    null = TypeError("pybind11::init(): factory function returned nullptr")
    trt.faults["Refitter.__init__"] = Fault(raises=null, says="engine is not refittable")
    error = refusal(folder)
    assert "expected an engine whose weights can be set, got engine is not refittable" in str(error)


def test_weights_are_hashed_before_they_are_read(folder: Path, trt: TensorRT) -> None:
    strip(folder)
    damage.flip(folder / "denoiser.bin")
    with pytest.raises(BundleError, match=r"file denoiser\.bin .*expected sha256"):
        TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert trt.called("Refitter.set_named_weights") == []


def test_a_file_of_weights_that_is_cut_off(tmp_path: Path) -> None:
    graph = by_hand(tmp_path)
    weights = tmp_path / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        BundleError, match=r"weight outside .* expected 24 bytes at 4096 of weights\.bin, got 23"
    ):
        list(graph_weights(graph))


def test_weights_of_a_graph_wherever_they_are(tmp_path: Path) -> None:
    """In a file, in the graph as bytes or as numbers, and as the value of a Constant."""
    assert [(name, kind, content.tobytes()) for name, kind, content in graph_weights(by_hand(tmp_path))] == [
        ("outside", "FLOAT", np.arange(6, dtype=np.float32).tobytes()),
        ("raw", "FLOAT16", np.arange(3, dtype=np.float16).tobytes()),
        ("listed", "INT64", np.arange(2, dtype=np.int64).tobytes()),
        ("constant", "FLOAT", np.float32(7).tobytes()),
    ]


def by_hand(folder: Path) -> Path:
    """A graph with a weight of every kind, written by onnx alone."""
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[2, 3])
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "4096"), ("length", "24")):
        outside.external_data.add(key=key, value=value)
    (folder / "weights.bin").write_bytes(b"\0" * 4096 + np.arange(6, dtype=np.float32).tobytes())
    listed = helper.make_tensor("listed", TensorProto.INT64, [2], [0, 1])
    raw = numpy_helper.from_array(np.arange(3, dtype=np.float16), "raw")
    value = helper.make_tensor("any name", TensorProto.FLOAT, [], [7.0])
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=value),
        helper.make_node("Constant", [], ["shape"], value_ints=[1, 2]),
    ]
    graph = helper.make_graph(nodes, "by hand", [], [], [outside, raw, listed])
    path = folder / "by_hand.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path
