"""One network in device memory at a time: the same frames, and never two networks at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svd_engine import VideoEngine
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks.modules import Modules
from svd_engine.residency.contract import Residency
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, reusing_specs
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH

Events = list[tuple[str, str]]


class Noted(Network):
    """Says when it is opened, moved, run and closed."""

    def __init__(self, spec: NetworkSpec, events: Events) -> None:
        super().__init__(spec, Placement("noted", "cpu", "float32", "opened"))
        self.events = events
        self.note("open")

    def note(self, what: str) -> None:
        self.events.append((what, self.spec.network))

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.note("run")
        return {tensor.name: torch.zeros(tensor.shape) for tensor in self.spec.outputs}

    def to_device(self) -> None:
        self.note("to device")

    def to_host(self) -> None:
        self.note("to host")

    def close(self) -> None:
        self.note("close")


class NotedBackend:
    name = "noted"

    def __init__(self, movable: bool) -> None:
        self.device = torch.device("cpu")
        self.movable = movable
        self.events: Events = []

    def open(self, spec: NetworkSpec) -> Network:
        return Noted(spec, self.events)

    def close(self) -> None:
        self.events.append(("close", "backend"))


@pytest.fixture(scope="module")
def specs(tiny_checkpoint: Path) -> dict[str, NetworkSpec]:
    architecture = open_checkpoint(str(tiny_checkpoint)).model.architecture
    profile = Profile(FRAMES, HEIGHT, WIDTH, decode_chunk=FRAMES)
    return {s.network: s for s in specs_of(profile, architecture, FLOAT32)}


def test_denoisers_that_reuse_stay_beside_each_other(specs: dict[str, NetworkSpec]) -> None:
    """They take turns at every evaluation, over the same weights."""
    full, shallow = reusing_specs(specs["denoiser"], Feature(2, 32, 1))
    backend = NotedBackend(movable=True)
    residency = Swapped(backend)
    networks = [
        residency.network(spec) for spec in (specs["vae_encoder"], full, shallow, specs["vae_decoder"])
    ]
    backend.events.clear()
    encoder, first, second, decoder = networks
    for network in (encoder, first, second, first, second, decoder):
        network(**zeros(network.spec))
    assert [event for event in backend.events if event[0] != "run"] == [
        ("to device", "vae_encoder"), ("to host", "vae_encoder"),
        ("to device", "denoiser"), ("to device", "shallow_denoiser"),
        ("to host", "shallow_denoiser"), ("to host", "denoiser"), ("to device", "vae_decoder"),
    ]  # fmt: skip
    residency.close()


def zeros(spec: NetworkSpec) -> dict[str, Tensor]:
    return {t.name: torch.zeros(t.shape) for t in spec.inputs}


def called_in_turn(residency: Residency, specs: dict[str, NetworkSpec]) -> list[Network]:
    """The image encoder, the denoiser twice and the image encoder again; then everything is closed."""
    networks = [residency.network(specs[name]) for name in ("image_encoder", "denoiser")]
    for number in (0, 1, 1, 0):
        networks[number](**zeros(networks[number].spec))
    residency.close()
    return networks


def test_a_network_that_cannot_move_is_opened_by_its_call_and_closed_by_the_next_ones(
    specs: dict[str, NetworkSpec],
) -> None:
    backend = NotedBackend(movable=False)
    residency = Swapped(backend)
    before = residency.network(specs["denoiser"]).placement
    assert before == Placement("noted", "cpu", "float32", "not opened")
    assert backend.events == []
    _, denoiser = called_in_turn(residency, specs)
    assert [event for event in backend.events if event[0] != "to device"] == [
        ("open", "image_encoder"), ("run", "image_encoder"), ("close", "image_encoder"),
        ("open", "denoiser"), ("run", "denoiser"), ("run", "denoiser"), ("close", "denoiser"),
        ("open", "image_encoder"), ("run", "image_encoder"), ("close", "image_encoder"),
        ("close", "backend"),
    ]  # fmt: skip
    assert denoiser.placement.detail == "opened"


def test_a_network_that_moves_is_opened_at_once_and_waits_in_host_memory(
    specs: dict[str, NetworkSpec],
) -> None:
    backend = NotedBackend(movable=True)
    called_in_turn(Swapped(backend), specs)
    assert [event for event in backend.events if event[0] != "run"] == [
        ("open", "image_encoder"), ("open", "denoiser"),
        ("to device", "image_encoder"), ("to host", "image_encoder"),
        ("to device", "denoiser"), ("to host", "denoiser"),
        ("to device", "image_encoder"),
        ("close", "denoiser"), ("close", "image_encoder"), ("close", "backend"),
    ]  # fmt: skip


@pytest.mark.parametrize("movable", [False, True])
def test_resident_networks_stay_until_all_are_closed(specs: dict[str, NetworkSpec], movable: bool) -> None:
    backend = NotedBackend(movable)
    called_in_turn(Resident(backend), specs)
    assert [event for event in backend.events if event[0] != "run"] == [
        ("open", "image_encoder"), ("to device", "image_encoder"),
        ("open", "denoiser"), ("to device", "denoiser"),
        ("close", "denoiser"), ("close", "image_encoder"), ("close", "backend"),
    ]  # fmt: skip


def frames_of(engine: VideoEngine) -> Tensor:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # the second call brings everything again
        result = engine(
            image, HEIGHT, WIDTH, FRAMES, num_inference_steps=2, output_type="pt",
            decode_chunk_size=CHUNK, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    assert result.report.swap_networks is isinstance(engine.residency, Swapped)
    assert all(p.dtype == "float32" for p in result.report.stages.values())
    assert isinstance(result.frames, Tensor)
    return result.frames


def test_swapped_gives_the_same_frames(tiny_bundle: Path) -> None:
    def frames(swap: bool) -> Tensor:
        with VideoEngine.from_bundle(tiny_bundle, device="cpu", swap_networks=swap) as engine:
            return frames_of(engine)

    assert torch.equal(frames(True), frames(False))


def test_a_network_that_does_not_fit_leaves_the_device_for_the_next_one(
    specs: dict[str, NetworkSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Noted) -> None:
        self.note("to device")
        if self.spec.network == "denoiser":
            raise MemoryError

    monkeypatch.setattr(Noted, "to_device", full)
    backend = NotedBackend(movable=True)
    residency = Swapped(backend)
    denoiser, encoder = residency.network(specs["denoiser"]), residency.network(specs["image_encoder"])
    for _ in range(2):
        with pytest.raises(MemoryError):
            denoiser(**zeros(denoiser.spec))
    encoder(**zeros(encoder.spec))
    assert backend.events[2:] == [
        ("to device", "denoiser"), ("to device", "denoiser"), ("to host", "denoiser"),
        ("to device", "image_encoder"), ("run", "image_encoder"),
    ]  # fmt: skip


def test_a_swapped_checkpoint_gives_the_same_frames(tiny_checkpoint: Path) -> None:
    """On the CPU, where each network is loaded for its stage."""

    def frames(swap: bool) -> Tensor:
        with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", swap_networks=swap) as engine:
            assert engine.backend.movable is False
            return frames_of(engine)

    assert (frames(True) - frames(False)).abs().max() < 1e-4  # loaded anew, at other addresses


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Resident, [("ImageEncoder", "cuda:0"), ("GuidedDenoiser", "cuda:0")]),
        (
            Swapped,
            [
                ("ImageEncoder", "cuda:0"), ("ImageEncoder", "cpu"), ("GuidedDenoiser", "cuda:0"),
                ("GuidedDenoiser", "cpu"), ("ImageEncoder", "cuda:0"),
            ],
        ),
    ],
)  # fmt: skip
def test_where_modules_are_told_to_go(
    specs: dict[str, NetworkSpec],
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Residency],
    expected: list[tuple[str, str]],
) -> None:
    """Without a GPU: where each network's weights would be, and nobody but residency moves them."""
    moves: list[tuple[str, str]] = []

    def to(self: nn.Module, device: Any) -> nn.Module:
        moves.append((type(self).__name__, str(device)))
        return self

    modules = Modules(open_checkpoint(str(tiny_checkpoint)))
    backend = EagerBackend(modules, torch.device("cuda:0"))
    residency = kind(backend)
    monkeypatch.setattr(nn.Module, "to", to)
    for name in ("image_encoder", "denoiser", "denoiser", "image_encoder"):
        residency.network(specs[name]).run(zeros(specs[name]))
    assert moves == expected
