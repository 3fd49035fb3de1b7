"""The denoiser block by block from host memory: the same frames, two blocks at a time, each ahead of use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from svd_engine.backends.torch.compiled import CompiledNetwork
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks import offloading
from svd_engine.networks.counting import TorchCosts
from svd_engine.networks.modules import Modules
from svd_engine.networks.offloading import Offloading, WaitingBlock, blocks_of, held_bytes, tensors_of
from svd_engine.networks.parity import example_inputs
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget
from svd_engine.residency.offloaded import Offloaded
from svd_engine.residency.planning import planner_of_checkpoint
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.precision import FLOAT32, Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, reusing_specs
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import FRAMES, HEIGHT, WIDTH

CPU = torch.device("cpu")


@pytest.fixture
def modules(tiny_checkpoint: Path) -> Modules:
    return Modules(open_checkpoint(str(tiny_checkpoint)), (), rewrites_for("eager", "cuda"))


def spec_of(modules: Modules, network: str = "denoiser", guidance: str = "batched") -> NetworkSpec:
    profile = Profile(FRAMES, HEIGHT, WIDTH, 1, guidance, FRAMES)  # type: ignore[arg-type]
    specs = specs_of(profile, modules.checkpoint.model.architecture, FLOAT32)
    return next(spec for spec in specs if spec.network == network)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to blocks, in order: "copy N", "run N"."""
    events: list[str] = []
    enter, bring = Offloading._enter, Offloading._bring

    def number(self: Offloading, block: WaitingBlock) -> int:
        return self.blocks.index(block)

    def noted_enter(self: Offloading, block: WaitingBlock) -> None:
        before = self._slot_of(block) is not None
        events.append(f"{'ready' if before else 'waits'} {number(self, block)}")
        enter(self, block)

    def noted_bring(self: Offloading, block: WaitingBlock, beside: object = None) -> object:
        events.append(f"copy {number(self, block)}")
        return bring(self, block, beside)  # type: ignore[arg-type]

    monkeypatch.setattr(Offloading, "_enter", noted_enter)
    monkeypatch.setattr(Offloading, "_bring", noted_bring)
    return events


def test_every_block_is_brought_ahead_of_its_use(modules: Modules, copied: list[str]) -> None:
    spec = spec_of(modules)
    module, inputs = modules.network(spec), example_inputs(spec)
    with torch.no_grad():
        expected = module(**inputs)
        offloaded = Offloading(module, CPU)
        first, second, third = (run(module, inputs, copied) for _ in range(3))
    count = len(offloaded.blocks)
    assert first.order == second.order == third.order
    assert sorted(first.order) == list(range(count))  # each whole, once an evaluation
    assert first.waited == count  # the order is not known yet
    assert second.waited == 1  # the first, which the last of the first evaluation did not know to follow
    assert third.waited == 0
    assert third.copies == count
    for result in (first, second, third):
        assert torch.equal(result.output, expected)
    offloaded.end()
    with torch.no_grad():
        assert torch.equal(module(**inputs), expected)


class Evaluation:
    def __init__(self, output: Tensor, events: list[str]) -> None:
        self.output = output
        runs = [event.split() for event in events if not event.startswith("copy")]
        self.order = [int(number) for _, number in runs]
        self.waited = sum(word == "waits" for word, _ in runs)
        self.copies = sum(event.startswith("copy") for event in events)


def run(module: torch.nn.Module, inputs: dict[str, Tensor], events: list[str]) -> Evaluation:
    events.clear()
    return Evaluation(module(**inputs), list(events))


def test_two_blocks_are_on_the_device_at_once(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block runs, its weights are in one buffer, and all others' in host memory."""
    spec = spec_of(modules)
    module = modules.network(spec)
    weights = sum(t.nbytes for t in tensors_of([module]))
    offloaded = Offloading(module, CPU)
    buffers = [slot.buffer for slot in offloaded.slots]
    rest = sum(t.nbytes for t in offloaded._rest)
    assert held_bytes(module) == rest + sum(buffer.nbytes for buffer in buffers) < weights / 2
    places = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    seen = []
    monkeypatch.setattr(
        offloaded, "_leave",
        lambda block: seen.append(
            [b for b in offloaded.blocks if b.tensors[0].untyped_storage().data_ptr() in places] == [block]
        ) or Offloading._leave(offloaded, block),
    )  # fmt: skip
    with torch.no_grad():
        module(**example_inputs(spec))
    assert seen == [True] * len(offloaded.blocks)
    assert all(b.tensors[0].untyped_storage().data_ptr() not in places for b in offloaded.blocks)


def test_host_memory_holds_the_weights_once(modules: Modules) -> None:
    """Offloaded again, also for a network of another form over the same UNet, nothing is copied anew."""
    batched, single = (modules.network(spec_of(modules, guidance=g)) for g in ("batched", "single"))
    first = Offloading(batched, CPU)
    places = [block.host.data_ptr() for block in first.blocks]
    first.end()
    again = Offloading(single, CPU)
    assert [block.host.data_ptr() for block in again.blocks] == places
    again.end()


def test_an_error_in_a_block_leaves_it_usable(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(modules)
    module, inputs = modules.network(spec), example_inputs(spec)
    with torch.no_grad():
        expected = module(**inputs)
        offloaded = Offloading(module, CPU)
        with monkeypatch.context() as patched:
            patched.setattr(type(blocks_of(module)[3]), "forward", lambda *_, **__: torch.empty(2**55))
            with pytest.raises(RuntimeError, match="can't allocate memory"):
                module(**inputs)
        assert torch.equal(module(**inputs), expected)
    offloaded.end()


def test_full_and_shallow_denoisers_take_turns(modules: Modules) -> None:
    """Their orders differ: what was brought for the wrong one is brought again."""
    full, shallow = (modules.network(s) for s in reusing_specs(spec_of(modules), Feature(2, 32, 1)))
    inputs = example_inputs(spec_of(modules))
    with torch.no_grad():
        denoised, feature = full(**inputs)
        expected = shallow(**inputs, feature=feature)
        offloaded = Offloading(full, CPU)
        for _ in range(2):
            assert torch.equal(full(**inputs)[0], denoised)
            assert torch.equal(shallow(**inputs, feature=feature), expected)
    offloaded.end()


def test_weights_keep_their_order_in_memory() -> None:
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    strides = conv.weight.stride()
    block = WaitingBlock(conv, CPU)
    assert conv.weight.stride() == strides
    with torch.no_grad():
        conv.weight.data = conv.weight.data.transpose(2, 3)[:, :, :, :2]  # gaps: stored without them
    assert offloading.dense_stride(conv.weight) == (18, 6, 2, 1)
    assert block.count == 512 + 256


# Residency


def test_only_the_denoiser_is_offloaded(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EagerBackend(modules, CPU)
    monkeypatch.setattr(backend, "movable", True)
    specs = [spec_of(modules, name) for name in ("image_encoder", "denoiser", "vae_decoder")]
    residency, plain = Offloaded(backend), Swapped(EagerBackend(modules, CPU))
    inputs = {spec.key: example_inputs(spec) for spec in specs}
    expected = [plain.network(spec).run(inputs[spec.key]) for spec in specs]
    networks = [residency.network(spec) for spec in specs]
    for _ in range(2):
        for network, result in zip(networks, expected, strict=True):
            for name, tensor in network.run(inputs[network.spec.key]).items():
                assert (tensor - result[name]).abs().max() <= 1e-6
    assert "block by block" in networks[1].placement.detail
    assert "block by block" not in networks[2].placement.detail
    residency.close()
    assert not blocks_of(modules.network(specs[1]))[0]._forward_hooks


def test_a_shallow_denoiser_shares_the_blocks_of_the_full_one(
    modules: Modules, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = EagerBackend(modules, CPU)
    monkeypatch.setattr(backend, "movable", True)
    full, shallow = reusing_specs(spec_of(modules), Feature(2, 64, 1))
    inputs = example_inputs(spec_of(modules))
    first, second, decoder = map(Offloaded(backend).network, (full, shallow, spec_of(modules, "vae_decoder")))
    expected = None
    for _ in range(2):
        made = first(**inputs)
        offloaded = first._opened.offloading  # type: ignore[attr-defined]
        reused = second(**inputs, feature=made["feature"])["denoised"]
        assert expected is None or torch.equal(reused, expected)
        expected = reused.clone()
        assert len(offloaded.slots) == 2
        assert all(block.tensors[0].data_ptr() == block.host.data_ptr() for block in offloaded.blocks)
        decoder(**example_inputs(decoder.spec))
        assert offloaded.slots == []
    with torch.no_grad():
        plain = modules.network(shallow)(**inputs, feature=made["feature"])
    assert torch.equal(plain, expected)


def test_a_compiled_denoiser_runs_in_eager_torch_while_it_is_offloaded(modules: Modules) -> None:
    spec = spec_of(modules)
    module, inputs = modules.network(spec), example_inputs(spec)
    with torch.no_grad():
        expected = module(**inputs)
    network = CompiledNetwork(spec, module, Placement("compiled", "cpu", "float32", "inductor"), print)
    network.offload()
    assert torch.equal(network.run(inputs)["denoised"], expected)
    assert (network.placement.backend, network.placement.detail) == (
        "eager", f"torch {torch.__version__}, block by block from host memory"
    )  # fmt: skip
    network.close()


def test_networks_without_blocks_say_so(modules: Modules) -> None:
    class Other(Network):
        def run(self, inputs: object) -> dict[str, Tensor]:
            return {}

    with pytest.raises(NotImplementedError, match="Other has no blocks that move"):
        Other(spec_of(modules), Placement("x", "cpu", "float32")).offload()


def test_the_planner_counts_what_is_offloaded(tiny_checkpoint: Path, modules: Modules) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    half = Precision.of("float16")
    planner = planner_of_checkpoint(checkpoint, Budget(2**60), "eager", torch.device("cuda"), half)
    settings = Settings(FRAMES, HEIGHT, WIDTH, steps=10)
    plans = {p.residency.name: p for p in reversed(planner.considered(settings, 1)) if p.slice_frames is None}
    assert plans.keys() == {"resident", "swapped", "offloaded"}
    swapped, offloaded = (plans[name].stages[2] for name in ("swapped", "offloaded"))
    costs = TorchCosts(checkpoint, "cuda", (), rewrites_for("eager", "cuda"))
    cost = costs(specs_of(plans["offloaded"].profile, planner.architecture, half)[2])
    assert offloaded.held_bytes == cost.least_weight_bytes
    assert offloaded.held_bytes < swapped.held_bytes / 2
    assert offloaded.moved_bytes == 10 * cost.weight_bytes  # in every evaluation
    assert plans["offloaded"].stages[3] == plans["swapped"].stages[3]
    assert plans["offloaded"].cost >= plans["swapped"].cost
    on_cpu = planner_of_checkpoint(checkpoint, Budget(2**60), "eager", CPU, FLOAT32)
    assert on_cpu.residencies == (planner.residencies[0], Swapped)
    swapping = planner_of_checkpoint(
        checkpoint, Budget(2**60), "eager", torch.device("cuda"), half, (), swap_networks=True
    )
    assert swapping.residencies == (Swapped,)
