"""One network in memory at a time: the same frames, and never two networks at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.networks.modules import Modules
from svd_engine.residency.swapped import SwappedBackend
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import FRAMES, HEIGHT, WIDTH

Events = list[tuple[str, str]]


class Noted(Network):
    """Says when it is opened, run and closed."""

    def __init__(self, spec: NetworkSpec, events: Events) -> None:
        super().__init__(spec, Placement("noted", "cpu", "float32", "opened"))
        self.events = events
        self.events.append(("open", spec.network))

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.events.append(("run", self.spec.network))
        return torch.zeros(self.spec.output.shape)

    def close(self) -> None:
        self.events.append(("close", self.spec.network))


class NotedBackend:
    name = "noted"

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.events: Events = []

    def open(self, spec: NetworkSpec) -> Network:
        return Noted(spec, self.events)

    def close(self) -> None:
        self.events.append(("close", "backend"))


@pytest.fixture(scope="module")
def specs(tiny_checkpoint: Path) -> dict[str, NetworkSpec]:
    architecture = open_checkpoint(str(tiny_checkpoint)).model.architecture
    return {s.network: s for s in specs_of(Profile(FRAMES, HEIGHT, WIDTH, decode_chunk=FRAMES), architecture)}


def zeros(spec: NetworkSpec) -> dict[str, Tensor]:
    return {t.name: torch.zeros(t.shape) for t in spec.inputs}


def test_a_network_is_opened_by_its_call_and_closed_by_the_next_ones(specs: dict[str, NetworkSpec]) -> None:
    inner = NotedBackend()
    backend = SwappedBackend(inner)
    encoder, denoiser = backend.open(specs["image_encoder"]), backend.open(specs["denoiser"])
    assert inner.events == []
    assert denoiser.placement == Placement("noted", "cpu", "", "not opened")
    for network in (encoder, denoiser, denoiser, encoder):
        network(**zeros(network.spec))
    backend.close()
    assert inner.events == [
        ("open", "image_encoder"), ("run", "image_encoder"), ("close", "image_encoder"),
        ("open", "denoiser"), ("run", "denoiser"), ("run", "denoiser"), ("close", "denoiser"),
        ("open", "image_encoder"), ("run", "image_encoder"), ("close", "image_encoder"),
        ("close", "backend"),
    ]  # fmt: skip
    assert denoiser.placement.detail == "opened"


def test_swapped_gives_the_same_frames(tiny_bundle: Path) -> None:
    def frames(swap: bool) -> Any:
        image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
        with VideoEngine.from_bundle(tiny_bundle, device="cpu", swap_networks=swap) as engine:
            for _ in range(2):  # the second call opens everything again
                result = engine(
                    image, HEIGHT, WIDTH, FRAMES, num_inference_steps=2, output_type="pt",
                    decode_chunk_size=2, generator=torch.Generator().manual_seed(0),
                )  # fmt: skip
        assert result.report.swap_networks is swap
        assert {p.backend for p in result.report.stages.values()} == {"onnxruntime"}
        assert all(p.dtype == "float32" for p in result.report.stages.values())
        return result.frames

    assert torch.equal(frames(True), frames(False))


def test_on_the_cpu_a_checkpoint_has_nowhere_to_swap_to(tiny_checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="swap_networks: expected a GPU, or a bundle, got"):
        VideoEngine.from_checkpoint(str(tiny_checkpoint), device="cpu", swap_networks=True)


def test_modules_leave_the_device_when_another_is_asked_for(
    specs: dict[str, NetworkSpec], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: what each network is told to do, and where its weights would be."""
    moves: list[tuple[str, str]] = []

    def to(self: nn.Module, device: Any) -> nn.Module:
        moves.append((type(self).__name__, str(device)))
        return self

    modules = Modules(open_checkpoint(str(tiny_checkpoint)), torch.float32, "cuda:0", one_at_a_time=True)
    monkeypatch.setattr(nn.Module, "to", to)
    for name in ("image_encoder", "denoiser", "denoiser", "image_encoder"):
        modules.network(specs[name])
    assert moves == [
        ("ImageEncoder", "cuda:0"),
        ("ImageEncoder", "cpu"), ("GuidedDenoiser", "cuda:0"),
        ("GuidedDenoiser", "cpu"), ("ImageEncoder", "cuda:0"),
    ]  # fmt: skip
    modules.release(specs["image_encoder"])
    modules.network(specs["denoiser"])
    assert moves[-1] == ("GuidedDenoiser", "cuda:0")
