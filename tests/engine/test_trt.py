"""The TensorRT backend over a recording double: what it calls, in which order, on which memory.

Nothing here ran on a GPU; the double reads and writes at the addresses that it is given, and a launch on
memory that was freed fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svd_engine.backends.fake import FUNCTIONS
from svd_engine.backends.tensorrt.network import TrtBackend, TrtNetwork
from svd_engine.bundle.flavours import Host
from svd_engine.bundle.reading import Bundle
from svd_engine.networks.parity import example_inputs
from svd_engine.spec.tensors import NetworkSpec
from tests.support import damage, tensorrt_double
from tests.support.networks import only
from tests.support.tensorrt_double import TensorRT
from tests.support.tensorrt_plans import add_plan, plan_of, specs

CPU = torch.device("cpu")


@pytest.fixture
def trt(planned: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """It computes what the fake backend does."""
    double = tensorrt_double.install(monkeypatch)
    by_key = {spec.key: spec for spec in specs(planned)}
    double.compute = lambda key, inputs: FUNCTIONS[by_key[key].network](inputs, by_key[key])
    return double


def denoiser(planned: Path) -> NetworkSpec:
    return next(spec for spec in specs(planned) if spec.network == "denoiser")


def opened(backend: TrtBackend, spec: NetworkSpec) -> TrtNetwork:
    network = backend.open(spec)
    assert isinstance(network, TrtNetwork)
    return network


def test_opening_a_network(trt: TensorRT, planned: Path) -> None:
    """Deserialised, checked, a context without memory of its own, every tensor bound to a buffer."""
    network = opened(TrtBackend(Bundle(planned), CPU), denoiser(planned))
    names = [tensor.name for tensor in (*network.spec.inputs, *network.spec.outputs)]
    assert trt.order() == [
        "Runtime.__init__",
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_execution_context",
        *["cuda.empty"] * len(names),
        *["IExecutionContext.set_tensor_address"] * len(names),
    ]
    assert trt.called("ICudaEngine.create_execution_context") == [("USER_MANAGED",)]
    buffers = network.inputs | network.outputs
    assert trt.called("IExecutionContext.set_tensor_address") == [(n, buffers[n].data_ptr()) for n in names]
    plan = Bundle(planned).plans(network.spec)[0]
    assert network.placement.backend == "tensorrt"
    assert network.placement.dtype == "float16"
    assert network.placement.detail == f"TensorRT 10.14.1.48, {plan.file}"


def test_one_runtime_for_all(trt: TensorRT, planned: Path) -> None:
    backend = TrtBackend(Bundle(planned), CPU)
    networks = [backend.open(spec) for spec in specs(planned)]
    assert len(networks) == 6
    assert trt.order().count("Runtime.__init__") == 1


def test_the_denoiser_is_recorded_once_and_replayed(trt: TensorRT, planned: Path) -> None:
    """25 steps: the first launched, the second recorded, 24 replays, on inputs that change and go away."""
    network = opened(TrtBackend(Bundle(planned), CPU), denoiser(planned))
    trt.calls.clear()
    for step in range(25):
        inputs = example_inputs(network.spec)
        inputs["sigma"] = torch.tensor(1.0 + step)
        expected = only(FUNCTIONS["denoiser"](inputs, network.spec))
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        output = only(network(**given))
        del given
        assert torch.equal(output, expected)
    key = network.spec.key
    address, size = trt.called("IExecutionContext.set_device_memory")[0][1:]
    assert trt.calls == [
        ("cuda.empty", ("TensorRT's activations", (3000,))),
        ("IExecutionContext.set_device_memory", (key, address, size)),
        ("cuda.wait for torch", ()),
        ("IExecutionContext.execute_async_v3", (key, 7)),
        ("cuda.torch waits", ()),
        ("cuda.capture", ()),
        ("IExecutionContext.execute_async_v3", (key, 7)),
        *[("cuda.replay", ())] * 24,
    ]


def test_without_graphs_every_call_is_launched(trt: TensorRT, planned: Path) -> None:
    network = TrtBackend(Bundle(planned), CPU, graphs=False).open(denoiser(planned))
    inputs = example_inputs(network.spec)
    for _ in range(3):
        assert torch.equal(only(network(**inputs)), only(FUNCTIONS["denoiser"](inputs, network.spec)))
    assert len(trt.called("IExecutionContext.execute_async_v3")) == 3
    assert trt.called("cuda.capture", "cuda.replay") == []


def test_other_networks_are_not_recorded(trt: TensorRT, planned: Path) -> None:
    backend = TrtBackend(Bundle(planned), CPU)
    for spec in specs(planned):
        if spec.network != "denoiser":
            network = backend.open(spec)
            for _ in range(3):
                network(**example_inputs(spec))
    assert trt.called("cuda.capture", "cuda.replay") == []


def test_nothing_waits_for_the_gpu_between_calls(trt: TensorRT, planned: Path) -> None:
    network = TrtBackend(Bundle(planned), CPU).open(denoiser(planned))
    for _ in range(5):
        network(**example_inputs(network.spec))
    assert trt.called("cuda.synchronize") == []


def test_one_block_of_memory_as_large_as_the_largest_needs(trt: TensorRT, planned: Path) -> None:
    """Of all networks that were opened before the first call; each context gets the same."""
    backend = TrtBackend(Bundle(planned), CPU)
    networks = [backend.open(spec) for spec in specs(planned)]  # they need 1000, 2000, ... 6000 bytes
    assert ("TensorRT's activations", (6000,)) not in trt.called("cuda.empty")
    for _ in range(2):
        for network in networks:
            network(**example_inputs(network.spec))
    allocated = [call for call in trt.called("cuda.empty") if call[0] == "TensorRT's activations"]
    assert allocated == [("TensorRT's activations", (6000,))]
    given = trt.called("IExecutionContext.set_device_memory")
    assert {(address, size) for _, address, size in given} == {(given[0][1], 6000)}
    assert [key for key, *_ in given] == [network.spec.key for network in networks]  # once each


def test_a_network_that_needs_more_comes_later(trt: TensorRT, planned: Path) -> None:
    """The old block is freed once nothing uses it; contexts get the new one and graphs are recorded anew."""
    backend = TrtBackend(Bundle(planned), CPU)
    network = backend.open(denoiser(planned))
    inputs = example_inputs(network.spec)
    for _ in range(2):
        network(**inputs)
    trt.calls.clear()
    larger = backend.open(specs(planned)[-1])
    for _ in range(2):
        assert torch.equal(only(network(**inputs)), only(FUNCTIONS["denoiser"](inputs, network.spec)))
    larger(**example_inputs(larger.spec))
    events = [name for name, _ in trt.calls if name.startswith("cuda.") or "memory" in name]
    first = events.index("cuda.synchronize")
    assert events[first : first + 9] == [
        "cuda.synchronize",
        "cuda.freed",
        "cuda.empty",
        "IExecutionContext.set_device_memory",
        "cuda.graph freed",
        "cuda.wait for torch",  # launched once, so that the context settles
        "cuda.torch waits",
        "cuda.capture",
        "cuda.replay",
    ]
    assert trt.called("cuda.empty")[-1] == ("TensorRT's activations", (6000,))


def test_the_output_is_a_buffer_that_the_next_call_writes_over(trt: TensorRT, planned: Path) -> None:
    network = TrtBackend(Bundle(planned), CPU).open(denoiser(planned))
    inputs = example_inputs(network.spec)
    first = only(network(**inputs))
    kept = first.clone()
    second = only(network(**{**inputs, "x": inputs["x"] + 1}))
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(second, kept)


def test_inputs_that_are_views_are_read_in_their_own_order(trt: TensorRT, planned: Path) -> None:
    spec = specs(planned)[0]
    network = TrtBackend(Bundle(planned), CPU).open(spec)
    pixels = example_inputs(spec)["pixels"]
    expected = only(network(pixels=pixels)).clone()
    turned = pixels.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    assert torch.equal(only(network(pixels=turned)), expected)


def test_close_waits_and_frees_from_the_top_down(trt: TensorRT, planned: Path) -> None:
    backend = TrtBackend(Bundle(planned), CPU)
    network = backend.open(denoiser(planned))
    for _ in range(2):
        network(**example_inputs(network.spec))
    trt.calls.clear()
    network.close()
    backend.close()
    buffers = len(network.spec.inputs) + 1
    assert trt.order() == [
        "cuda.synchronize",
        "cuda.graph freed",
        "IExecutionContext.freed",
        "ICudaEngine.freed",
        *["cuda.freed"] * buffers,
        "cuda.synchronize",  # before the activations
        "cuda.freed",
        "Runtime.freed",
    ]
    assert trt.called("cuda.freed")[-1] == ("TensorRT's activations",)


def test_a_closed_backend_opens_again(trt: TensorRT, planned: Path) -> None:
    backend = TrtBackend(Bundle(planned), CPU)
    for _ in range(2):
        network = backend.open(denoiser(planned))
        network(**example_inputs(network.spec))
        network.close()
        backend.close()
    assert trt.order().count("Runtime.__init__") == trt.order().count("Runtime.freed") == 2


def test_the_fitting_plan_is_the_one_that_is_read(trt: TensorRT, planned: Path) -> None:
    """Among plans for other machines, which are no plans at all here."""
    spec = denoiser(planned)
    damage.edit(planned, lambda m: m.update(plans=[]))
    other = add_plan(planned, spec, host=Host("tensorrt", "11.0.0.1", "Other", (8, 0)))
    (planned / other.file).write_bytes(b"not for us")
    damage.trust(planned, other.file)
    add_plan(planned, spec, plan_of(spec))
    network = TrtBackend(Bundle(planned), CPU).open(spec)
    network(**example_inputs(spec))
