"""One contract over all backends: what they take, what they give, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine.backends.fake import FakeBackend
from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.backends.torch.compiled import CompiledBackend
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import BackendError, TensorMismatch
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.spec.network import Backend, Network
from svd_engine.spec.tables import NETWORKS
from svd_engine.spec.tensors import NetworkSpec
from tests.support.networks import only

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def specs(tiny_bundle: Path) -> dict[str, NetworkSpec]:
    bundle = Bundle(tiny_bundle)
    return {s.network: s for s in bundle.specs_of(bundle.manifest.profiles[0])}


@pytest.fixture(scope="module", params=["fake", "eager", "compiled", "onnxruntime"])
def backend(request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_bundle: Path) -> Iterator[Backend]:
    def modules() -> Modules:
        return Modules(open_checkpoint(str(tiny_checkpoint)))

    made: dict[str, Any] = {
        "fake": FakeBackend,
        "eager": lambda: EagerBackend(modules(), CPU),
        "compiled": lambda: CompiledBackend(modules(), CPU),
        "onnxruntime": lambda: OrtBackend(Bundle(tiny_bundle), CPU),
    }
    opened: Backend = made[request.param]()
    yield opened
    opened.close()


@pytest.fixture(params=[name for name in NETWORKS if name not in ("shallow_denoiser", "decoder_segment")])
def network(
    request: pytest.FixtureRequest, backend: Backend, specs: dict[str, NetworkSpec]
) -> Iterator[Network]:
    opened = backend.open(specs[request.param])
    yield opened
    opened.close()


def test_gives_what_the_table_says(network: Network) -> None:
    spec = network.spec
    inputs = example_inputs(spec)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = network(**inputs)
    assert list(outputs) == [tensor.name for tensor in spec.outputs]
    output = only(outputs)
    assert (tuple(output.shape), output.dtype) == (spec.outputs[0].shape, torch.float32)
    assert bool(output.isfinite().all())
    first = output.clone()
    assert torch.equal(only(network(**inputs)), first), "the same inputs give the same output"
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "inputs are only read"


def test_says_where_it_ran(network: Network, backend: Backend) -> None:
    assert (network.placement.backend, network.placement.device) == (backend.name, "cpu")
    assert network.placement.dtype == "float32"


def test_takes_views(network: Network) -> None:
    """Expanded and transposed tensors are tensors too."""
    inputs = example_inputs(network.spec)
    plain = only(network(**inputs)).clone()
    views = {name: strided(tensor) for name, tensor in inputs.items()}
    assert any(not tensor.is_contiguous() for tensor in views.values())
    torch.testing.assert_close(only(network(**views)), plain, rtol=1e-4, atol=1e-4)


def test_refuses_a_wrong_name_dtype_or_shape_in_this_order(network: Network) -> None:
    inputs = example_inputs(network.spec)
    name = next(iter(inputs))
    rest = {key: tensor for key, tensor in inputs.items() if key != name}
    with pytest.raises(TensorMismatch, match=rf"inputs of .*: expected {name}.*, got .*Pass exactly"):
        network(**rest, wrong=inputs[name])
    with pytest.raises(TensorMismatch, match=rf"input '{name}' .* expected float32 .* got float64 .*Convert"):
        network(**rest, **{name: inputs[name].double()})
    with pytest.raises(TensorMismatch, match=rf"input '{name}' .* expected float32 .* got float32 \[1, 1, "):
        network(**rest, **{name: inputs[name][None, None]})
    with pytest.raises(TensorMismatch, match=rf"input '{name}' .* expected a tensor on cpu, got one on meta"):
        network(**rest, **{name: inputs[name].to("meta")})


def test_equals_eager(network: Network, tiny_checkpoint: Path) -> None:
    if network.placement.backend == "fake":
        pytest.skip("the fake has no weights; every other backend is compared")
    eager = EagerBackend(Modules(open_checkpoint(str(tiny_checkpoint))), CPU).open(network.spec)
    inputs = example_inputs(network.spec)
    expected = only(eager(**inputs))
    difference = float((only(network(**inputs)) - expected).abs().max())
    assert difference <= 1e-4 * float(expected.abs().max())


def test_what_torch_cannot_compile_is_an_error(
    specs: dict[str, NetworkSpec], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(torch.nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return pixels

    backend = CompiledBackend(Modules(open_checkpoint(str(tiny_checkpoint))), CPU)
    spec = specs["image_encoder"]
    monkeypatch.setattr(backend.modules, "network", lambda spec: Breaks())
    with pytest.raises(
        BackendError, match=r"torch.compile of image_encoder.*one graph.*got .*backend=\"eager\""
    ):
        backend.open(spec)(**example_inputs(spec))


def strided(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor
