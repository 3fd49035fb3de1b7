"""Several engines in one process: each plans beside what the others hold, and what they have loaded since."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.networks.counting import TorchCosts
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.request import Settings
from svd_engine.residency import planner as planners
from svd_engine.residency.budget import CUDA_RUNTIME_BYTES, Budget, Memory, used_by_runtime
from svd_engine.residency.holding import Holding
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.swapped import Swapped
from tests.conftest import FRAMES, HEIGHT, WIDTH

ALL = 2**60
SETTINGS = Settings(FRAMES, HEIGHT, WIDTH, steps=1, max_guidance_scale=1.0, decoding="whole")
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _of_a_process_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside networks: their memory is so small here that all else would hide it."""
    monkeypatch.setattr(planners, "used_by_runtime", lambda device: 0)
    gc.collect()  # engines that other tests have left


def video(engine: VideoEngine) -> Any:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    return engine(
        image, HEIGHT, WIDTH, FRAMES, 1, generator=torch.Generator().manual_seed(0), output_type="latent",
        max_guidance_scale=1.0, decoding="whole",
    )  # fmt: skip


def planner_of(engine: VideoEngine) -> Planner:
    assert engine.source.planner is not None
    return engine.source.planner


def changed(engine: VideoEngine, **changes: Any) -> None:
    engine.source = replace(engine.source, planner=replace(planner_of(engine), **changes))


def load(engine: VideoEngine) -> None:
    """What a call does before it loads networks."""
    planner_of(engine).keep(planner_of(engine).choose(SETTINGS, 1))


def considered(engine: VideoEngine) -> list[Plan]:
    return planner_of(engine).considered(SETTINGS, 1)


@pytest.fixture(scope="module")
def costs(tiny_checkpoint: Path) -> TorchCosts:
    """What one engine has counted the others need not."""
    return TorchCosts(open_checkpoint(str(tiny_checkpoint)), "cpu", (), rewrites_for("eager", "cpu"))


@pytest.fixture
def opened(tiny_checkpoint: Path, costs: TorchCosts) -> Callable[..., VideoEngine]:
    def opened(memory: Memory = ALL) -> VideoEngine:
        engine = VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu", memory=memory)
        changed(engine, cost_of=costs)
        return engine

    return opened


@pytest.mark.parametrize("memory", [ALL, "auto"])
def test_the_first_counts_what_the_second_has_loaded_since(
    opened: Callable[..., VideoEngine], memory: Memory
) -> None:
    """Also of a second one whose networks were not counted, for memory was ample."""
    first, second = opened(), opened(memory)
    with first, second:
        alone = video(first)
        stages = alone.report.plan.stages
        weights = stages[0].held_bytes  # resident: of all networks
        swapped = min(p.peak_bytes for p in considered(first) if p.residency is Swapped) + weights
        changed(first, budget=Budget(max(swapped, alone.report.plan.peak_bytes)))
        assert video(first).report.plan.stages == stages
        assert (video(second).report.plan is None) is (memory == "auto")
        assert planner_of(first)._runtime_bytes == weights
        beside = video(first)
        assert beside.report.plan.residency == "swapped"
        assert torch.equal(beside.frames, alone.frames)
        assert beside.report.plan.peak_bytes <= beside.report.plan.budget_bytes
        second.close()
        assert video(first).report.plan.stages == stages


def test_what_does_not_fit_beside_another_is_refused(opened: Callable[..., VideoEngine]) -> None:
    """Until that is closed, or gone without a word."""
    first, second = opened(), opened()
    least = min(plan.peak_bytes for plan in considered(first))
    changed(first, budget=Budget(least), lesser=lambda settings: iter(()))
    load(first)
    load(second)
    with pytest.raises(SettingsError, match=r"^memory: expected"):
        load(first)
    second.close()
    load(first)
    load(second)
    with pytest.raises(SettingsError, match=r"^memory: expected"):
        load(first)
    del second
    gc.collect()
    load(first)


def test_what_was_loaded_before_counts_once(opened: Callable[..., VideoEngine]) -> None:
    """The process has it already when the second one measures what there is."""
    first, second = opened(), opened()
    load(first)
    load(second)
    assert planner_of(second)._runtime_bytes == 0
    assert planner_of(first)._runtime_bytes > 0
    first.close()
    assert planner_of(second)._runtime_bytes == 0  # not less than nothing


def test_nothing_is_counted_while_nothing_changes() -> None:
    mine, other = Holding(FIRST, outside_torch=False), Holding(FIRST, outside_torch=False)
    counted: list[str] = []
    for plan in ("a", "a", "b"):
        other.keep(plan, lambda plan=plan: counted.append(plan) or 7)
    before = mine.beside()
    assert counted == []
    other.keep("b", lambda: 8)
    assert mine.beside() == before
    assert [count() for count in before for _ in range(2)] == [7, 7]
    assert counted == ["b"]
    other.release()
    assert mine.beside() == frozenset()


def test_of_a_gpu_what_torch_does_not_know_counts() -> None:
    """Of the device that it lies on."""
    outside, inside = Holding(FIRST, outside_torch=True), Holding(FIRST, outside_torch=False)
    for one in (outside, inside):
        one.keep("plan", lambda: 5)
    assert used_by_runtime(FIRST) == CUDA_RUNTIME_BYTES + 5
    assert used_by_runtime(SECOND) == CUDA_RUNTIME_BYTES
    assert len(Holding(FIRST, outside_torch=True).beside()) == 2
    assert Holding(SECOND, outside_torch=True).beside() == frozenset()
    del outside
    assert used_by_runtime(FIRST) == CUDA_RUNTIME_BYTES
