"""A network of two outputs, on every backend: a result, and state for a later call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from svd_engine import pipeline
from svd_engine.backends.fake import FUNCTIONS, FakeBackend
from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.backends.tensorrt.network import TrtBackend
from svd_engine.backends.torch.compiled import CompiledBackend
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint, open_checkpoint
from svd_engine.errors import BackendError, BundleError, TensorMismatch
from svd_engine.networks.modules import Modules
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.network import Backend, Network, Placement, named_outputs
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tensors import NetworkSpec, TensorSpec
from svd_export import verify
from svd_export.to_onnx import export_network
from svd_export.triton_config import network_model
from svd_export.weights import WeightsFile
from tests.support import damage, tensorrt_double, tensorrt_plans

CPU = torch.device("cpu")
SPEC = NetworkSpec(
    "vae_decoder",
    "vae_decoder-streamed",
    (TensorSpec("latent", (2, 4)), TensorSpec("before", (1, 4))),
    (TensorSpec("frames", (2, 3)), TensorSpec("after", (1, 4))),
    FLOAT32,
)


class Streamed(nn.Module):
    """Frames of a chunk and of the last latent before it, and the last latent for the next chunk."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.project = nn.Linear(4, 3)
        self.outputs = outputs
        with torch.no_grad():
            self.project.weight.copy_(torch.arange(12.0).reshape(3, 4) / 10)
            self.project.bias.fill_(0.5)

    def forward(self, latent: Tensor, before: Tensor) -> tuple[Tensor, ...]:
        shifted = torch.cat([before, latent[:-1]])
        return (self.project(latent + shifted), latent[1:] * 2)[: self.outputs]


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in SPEC.inputs}


def expected() -> dict[str, Tensor]:
    with torch.no_grad():
        frames, after = Streamed()(**inputs())
    return {"frames": frames, "after": after}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return open_checkpoint(str(tiny_checkpoint))


def modules(checkpoint: Checkpoint, module: nn.Module) -> Modules:
    """Whose VAE decoder is `module`."""
    made = Modules(checkpoint)
    made._networks["vae_decoder", None, "float32", None, None, None] = module.eval()
    return made


@pytest.fixture
def bundle(tiny_bundle: Path, checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """With this network beside the others."""
    folder = damage.copy(tiny_bundle, tmp_path)
    with WeightsFile(folder / "streamed.bin") as weights:
        entry = export_network(modules(checkpoint, Streamed()), SPEC, weights, ["onnxruntime", "tensorrt"])
    for name in (*entry.graphs.values(), entry.weights):
        damage.trust(folder, name)
    damage.edit(folder, lambda m: m["networks"].append(entry.model_dump(mode="json")))
    return folder


def fake(monkeypatch: pytest.MonkeyPatch) -> Backend:
    def streamed(given: Mapping[str, Tensor], _spec: NetworkSpec) -> dict[str, Tensor]:
        with torch.no_grad():
            frames, after = Streamed()(**given)
        return {"frames": frames, "after": after}

    monkeypatch.setitem(FUNCTIONS, "vae_decoder", streamed)
    return FakeBackend()


def tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Backend:
    double = tensorrt_double.install(monkeypatch)
    module = Streamed().requires_grad_(False)
    double.compute = lambda key, given: named_outputs(SPEC, module(**given))
    tensorrt_plans.add_plan(bundle, SPEC)
    return TrtBackend(Bundle(bundle), CPU)


@pytest.fixture(params=["fake", "eager", "compiled", "onnxruntime", "tensorrt"])
def backend(
    request: pytest.FixtureRequest, bundle: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> Backend:
    made: dict[str, Callable[[], Backend]] = {
        "fake": lambda: fake(monkeypatch),
        "eager": lambda: EagerBackend(modules(checkpoint, Streamed()), CPU),
        "compiled": lambda: CompiledBackend(modules(checkpoint, Streamed()), CPU),
        "onnxruntime": lambda: OrtBackend(Bundle(bundle), CPU),
        "tensorrt": lambda: tensorrt(bundle, monkeypatch),
    }
    return made[request.param]()


def same(got: Mapping[str, Tensor]) -> None:
    assert list(got) == ["frames", "after"]
    torch.testing.assert_close(dict(got), expected(), rtol=0, atol=1e-6)


def test_outputs_come_by_name(backend: Backend) -> None:
    network = backend.open(SPEC)
    same(network(**inputs()))
    network.close()
    backend.close()


def test_outputs_come_by_name_from_a_swapped_network(backend: Backend) -> None:
    residency = Swapped(backend)
    same(residency.network(SPEC)(**inputs()))
    residency.close()


def test_state_of_one_call_goes_into_the_next(backend: Backend) -> None:
    """Outputs are buffers of the network: what is kept is cloned, and then is an input like any other."""
    network = backend.open(SPEC)
    given = inputs()
    after = network(**given)["after"].clone()
    again = network(**{**given, "before": after})
    with torch.no_grad():
        frames, _ = Streamed()(given["latent"], after)
    torch.testing.assert_close(again["frames"], frames, rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", [0, 1])
def test_a_module_that_returns_too_few(checkpoint: Checkpoint, outputs: int) -> None:
    network = EagerBackend(modules(checkpoint, Streamed(outputs)), CPU).open(SPEC)
    with pytest.raises(TensorMismatch, match=f"expected frames, after, got {outputs} tensors"):
        network(**inputs())


def test_rows_are_put_together_output_by_output() -> None:
    class Doubled(Network):
        def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"frames": given["latent"], "after": given["latent"] * 2}

    spec = NetworkSpec("any", "any", (TensorSpec("latent", (2, 1)),), SPEC.outputs, FLOAT32)
    network = Doubled(spec, Placement("test", "cpu", "float32"))
    rows = pipeline.in_batches(network, 2, latent=torch.arange(5.0)[:, None])
    assert rows["frames"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert rows["after"].flatten().tolist() == [0, 2, 4, 6, 8]


def test_graphs_and_triton_s_models_name_them(bundle: Path) -> None:
    entry = Bundle(bundle).entry(SPEC)
    for name in entry.graphs.values():
        graph = onnx.load(str(bundle / name), load_external_data=False).graph
        assert [output.name for output in graph.output] == ["frames", "after"]
    text = network_model(SPEC, "onnxruntime")
    outputs = text.split("output [")[1].split("]\ninstance_group")[0]
    assert [name in outputs for name in ('name: "frames"', 'name: "after"')] == [True, True]


def test_verify_has_a_row_for_each(
    bundle: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Bundle(bundle)

    def rows(module: nn.Module) -> dict[str, float]:
        monkeypatch.setattr(verify, "Modules", lambda *_, **__: modules(checkpoint, module))
        found = verify.compare(OrtBackend(opened, CPU), checkpoint, opened.entry(SPEC))
        return {row.output: row.relative for row in found}

    right = rows(Streamed())
    assert list(right) == ["frames", "after"]
    assert max(right.values()) < 1e-5
    other = Streamed()
    torch.nn.init.zeros_(other.project.bias)
    wrong = rows(other)
    assert wrong["frames"] > 0.05
    assert wrong["after"] < 1e-5  # each output against its own reference


def test_a_graph_without_the_second_one_is_refused(bundle: Path) -> None:
    name = Bundle(bundle).entry(SPEC).graphs["onnxruntime"]
    model = onnx.load(str(bundle / name), load_external_data=False)
    del model.graph.output[1]
    (bundle / name).write_bytes(model.SerializeToString())
    damage.trust(bundle, name)
    with pytest.raises(BundleError, match=r"-> after float32 \[1, 4\], frames float32 \[2, 3\], got"):
        OrtBackend(Bundle(bundle), CPU).open(SPEC)


def test_a_plan_without_the_second_one_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_double.install(monkeypatch)
    plan = tensorrt_plans.plan_of(SPEC)
    del plan["tensors"]["after"]
    tensorrt_plans.add_plan(bundle, SPEC, plan)
    with pytest.raises(BackendError, match=r"output after float32 \[1, 4\], output frames"):
        TrtBackend(Bundle(bundle), CPU).open(SPEC)
