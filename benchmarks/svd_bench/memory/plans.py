"""How a video would run on cards of each memory size: what `svd-bench tiers --plans` shows.  Runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from svd_bench.documents.table import Table
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.report import size
from svd_engine.request import Settings
from svd_engine.residency.budget import AUTO_SHARE, Budget
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner, checkpoint_profiles
from svd_engine.residency.planning import planner_of_checkpoint
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.cost import CostOf
from svd_engine.spec.model import Model
from svd_engine.spec.precision import Precision

MEMORIES = (6, 8, 10, 12, 16, 24, 48, 80, 141)  # GB of cards; NVIDIA's are 2**30 bytes
GPU, HALF = torch.device("cuda"), Precision.of("float16")
NO_LIMIT = Budget(2**60)


@dataclass(frozen=True)
class Ways:
    """Every plan of one video on one engine; all make the same video."""

    video: str
    engine: str
    plans: Sequence[Plan]

    @property
    def fastest(self) -> Plan:
        return min(self.plans, key=lambda plan: plan.cost)

    @property
    def smallest(self) -> Plan:
        return min(self.plans, key=lambda plan: plan.peak_bytes)

    def within(self, limit: float) -> Plan | None:
        """The fastest that takes no more than `limit` bytes; None when none does."""
        fitting = [plan for plan in self.plans if plan.peak_bytes <= limit]
        return min(fitting, key=lambda plan: plan.cost, default=None)


def ways_of_torch(checkpoint: Checkpoint) -> Ways:
    """Counted, without reading weights."""
    model = checkpoint.model
    planner = planner_of_checkpoint(checkpoint, NO_LIMIT, "compiled", GPU, HALF)
    return Ways(_video(model), "torch.compile", planner.considered(_call(model), 1))


def ways_of_compiled(model: Model, engine: str, cost_of: CostOf, slices: Sequence[int] = ()) -> Ways:
    """A bundle's networks, both guidance modes, decoded whole or streamed so many frames at a time."""
    planner = Planner(
        NO_LIMIT, GPU, model.architecture, HALF, cost_of, checkpoint_profiles, (Resident, Swapped),
        slices=slices, lesser=lambda _: iter(()),
    )  # fmt: skip
    return Ways(_video(model), engine, planner.considered(_call(model), 1))


def plans_table(all_ways: Sequence[Ways], memories: Sequence[int] = MEMORIES) -> Table:
    rows = [row for memory in memories for ways in all_ways for row in _rows(memory, ways)]
    return Table(
        "How a video runs on cards of each memory size, exact",
        [
            "card",
            "video",
            "engine",
            "networks",
            "guidance",
            "decoder",
            "peak",
            "known from",
            "predicted time",
        ],
        rows,
        left=6,
        note=f"Planned, not measured: the fastest way below {AUTO_SHARE:.0%} of the card's memory, "
        "the rest being the system's.\nEvery way makes the same video. Predicted time: over that of the "
        "fastest way of the same video and engine.\nTensorRT's own compiler was not at hand: its plans say "
        "what they take when they are built (`svd-engine plan BUNDLE`).",
    )


def _rows(memory: int, ways: Ways) -> Iterator[list[str]]:
    plan = ways.within(AUTO_SHARE * memory * 2**30)
    shown = plan or ways.smallest
    largest = max(shown.stages, key=lambda stage: stage.peak_bytes)
    yield [
        f"{memory} GB", ways.video, ways.engine,
        *(
            [plan.residency.name, plan.profile.guidance, plan.decoding]
            if plan else ["does not fit", "-", f"{largest.network} takes most"]
        ),
        size(shown.peak_bytes), shown.stages[0].source,
        f"{plan.cost / ways.fastest.cost:.2f}x" if plan else "-",
    ]  # fmt: skip


def _video(model: Model) -> str:
    return f"{model.name}, {model.frames} x {model.height} x {model.width}"


def _call(model: Model) -> Settings:
    return Settings(
        frames=model.frames, height=model.height, width=model.width, rho=model.rho,
        min_guidance_scale=model.min_guidance_scale, max_guidance_scale=model.max_guidance_scale,
    )  # fmt: skip
