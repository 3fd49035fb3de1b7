"""ONNX Runtime: the provider asked for or an error; its own errors come back as ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from svd_engine.backends import onnxruntime as ort
from svd_engine.backends.onnxruntime import OrtBackend, OrtNetwork, load_runtime
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BackendUnavailable, BundleError
from svd_engine.install import install_line
from svd_engine.networks.parity import example_inputs
from svd_engine.spec.tensors import NetworkSpec
from tests.support import damage
from tests.support.networks import only

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def encoder(folder: Path) -> NetworkSpec:
    bundle = Bundle(folder)
    return bundle.specs_of(bundle.manifest.profiles[0])[0]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return damage.copy(tiny_bundle, tmp_path)


def test_the_placement_is_what_the_session_says(tiny_bundle: Path) -> None:
    network = OrtBackend(Bundle(tiny_bundle), CPU).open(encoder(tiny_bundle))
    assert isinstance(network, OrtNetwork)
    placement = network.placement
    assert (placement.backend, placement.device, placement.dtype) == ("onnxruntime", "cpu", "float32")
    assert placement.detail == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    assert network.session.get_providers()[0] == "CPUExecutionProvider"


def test_onnxruntime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for device, extra in ((CPU, "cpu"), (CUDA, "cuda")):
        with pytest.raises(BackendUnavailable) as caught:
            load_runtime(device)
        assert "expected the package onnxruntime, got none installed" in str(caught.value)
        assert install_line(extra) in caught.value.remedy


def test_a_provider_that_is_not_available(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable) as caught:
        OrtBackend(Bundle(tiny_bundle), CUDA)
    assert "on cuda:0: expected CUDAExecutionProvider, got CPUExecutionProvider" in str(caught.value)
    assert "pip uninstall -y onnxruntime" in caught.value.remedy


def test_what_loading_freed_goes_back(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That memory is given back then, `test_freed_memory_goes_back_to_the_system` shows."""
    given_back: list[str] = []
    monkeypatch.setattr(ort, "give_back_freed", lambda: given_back.append("once"))
    OrtBackend(Bundle(tiny_bundle), CPU).open(encoder(tiny_bundle)).close()
    assert given_back == ["once"]


def test_a_session_that_fell_back_is_an_error(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime returns a CPU session when CUDA's libraries do not load; nothing is run on it."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])

    def on_the_cpu(path: str, options: Any, providers: Any) -> Any:
        assert providers == [("CUDAExecutionProvider", {"device_id": "0"})]
        return session(path, options, providers=["CPUExecutionProvider"])

    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(ort, "_memory", lambda device: 2**40)
    with pytest.raises(BackendUnavailable) as caught:
        OrtBackend(Bundle(tiny_bundle), CUDA).open(encoder(tiny_bundle))
    assert "expected CUDAExecutionProvider, got CPUExecutionProvider" in str(caught.value)
    assert install_line("cuda") in caught.value.remedy
    assert 'device="cpu"' in caught.value.remedy


def test_a_graph_that_it_cannot_load(bundle: Path) -> None:
    name = damage.network(bundle, "image_encoder")["graphs"]["onnxruntime"]
    model = onnx.load(str(bundle / name), load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    (bundle / name).write_bytes(model.SerializeToString())
    damage.trust(bundle, name)
    with pytest.raises(BundleError, match="expected static shapes of every tensor"):
        OrtBackend(Bundle(bundle), CPU).open(encoder(bundle))


def test_weights_that_are_cut_off(bundle: Path) -> None:
    """The manifest agrees with the short file; ONNX Runtime finds that tensors reach beyond its end."""
    weights = bundle / "image_encoder.bin"
    weights.write_bytes(weights.read_bytes()[:4096])
    damage.trust(bundle, weights.name)
    with pytest.raises(BackendError, match="expected a graph that it can run") as caught:
        OrtBackend(Bundle(bundle), CPU).open(encoder(bundle))
    assert "--dtype fp32" in caught.value.remedy


def test_an_error_while_it_runs(tiny_bundle: Path) -> None:
    network = OrtBackend(Bundle(tiny_bundle), CPU).open(encoder(tiny_bundle))
    assert isinstance(network, OrtNetwork)

    class OutOfMemory:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, _: Any) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    session, network.session = network.session, OutOfMemory()
    with pytest.raises(BackendError) as caught:
        network(**example_inputs(network.spec))
    assert f"ONNX Runtime, {network.spec.key} on cpu: expected a run without error" in str(caught.value)
    assert "Failed to allocate memory" in caught.value.got
    assert "smaller profile" in caught.value.remedy


def test_inputs_that_are_views_are_read_in_their_own_order(tiny_bundle: Path) -> None:
    """Inputs are bound by address: a transposed tensor must not be read as if it were contiguous."""
    network = OrtBackend(Bundle(tiny_bundle), CPU).open(encoder(tiny_bundle))
    pixels = example_inputs(network.spec)["pixels"]
    expected = only(network(pixels=pixels)).clone()
    turned = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert torch.equal(only(network(pixels=turned)), expected)


def test_the_output_is_a_buffer_that_the_next_call_writes_over(tiny_bundle: Path) -> None:
    network = OrtBackend(Bundle(tiny_bundle), CPU).open(encoder(tiny_bundle))
    pixels = example_inputs(network.spec)["pixels"]
    first = only(network(pixels=pixels))
    kept = first.clone()
    second = only(network(pixels=pixels + 1))
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(second, kept)
    network.close()
    assert not hasattr(network, "session")
