"""How a video would run on cards of each memory size: what `svd-bench tiers --plans` shows.  Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from svd_bench.cards.cards import Card, card_named
from svd_bench.cards.predict import CompiledVideo, predict
from svd_bench.compiled.costs import DocumentCosts
from svd_bench.compiled.whole_video import committed, committed_streamed, whole_video
from svd_bench.documents.strict import StrictModel
from svd_bench.documents.table import Table
from svd_engine.bundle.flavours import TENSORRT_RTX, sm
from svd_engine.checkpoint.configs import vae_levels
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import SettingsError
from svd_engine.report import size
from svd_engine.request import Settings
from svd_engine.residency.budget import AUTO_SHARE, NO_LIMIT
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner, checkpoint_profiles
from svd_engine.residency.planning import planner_of_checkpoint
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.cost import CostOf
from svd_engine.spec.model import Model
from svd_engine.spec.precision import Precision

CARD_OF = {  # GB of cards, NVIDIA's are 2**30 bytes, and a card for its speed: the 6 GB row has an 8 GB one's
    6: "GeForce RTX 4060", 8: "GeForce RTX 4060", 10: "GeForce RTX 3080", 12: "GeForce RTX 4070",
    16: "GeForce RTX 4080", 24: "GeForce RTX 4090", 48: "L40S", 80: "H100 SXM", 141: "H200 SXM",
}  # fmt: skip
COMMITTED = Path(__file__).parents[1] / "results/plans/plans.json"  # what docs/cards.md shows
GPU, HALF = torch.device("cuda"), Precision.of("float16")


@dataclass(frozen=True)
class Ways:
    """Every plan of one video on one engine; all make the same video."""

    video: str
    engine: str
    plans: Sequence[Plan]
    compiled: CompiledVideo | None = None

    def seconds(self, card: Card) -> float:
        """Of the fastest, at the card's peak rates: its kernels, or its operations where none are known."""
        if self.compiled is not None:
            return predict(card, self.compiled).seconds
        return self.fastest.cost / card.flops

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


def ways_of_compiled(
    model: Model,
    engine: str,
    cost_of: CostOf,
    compiled: CompiledVideo | None = None,
    slices: Sequence[int] = (),
) -> Ways:
    """A bundle's networks, both guidance modes, decoded whole or streamed so many frames at a time."""
    planner = Planner(
        NO_LIMIT, GPU, model.architecture, HALF, cost_of, checkpoint_profiles, (Resident, Swapped),
        slices=slices, lesser=lambda _: iter(()),
    )  # fmt: skip
    return Ways(_video(model), engine, planner.considered(_call(model), 1), compiled)


def ways_of_committed(checkpoint: Checkpoint) -> list[Ways]:
    """On each compiler and target whose figures of the checkpoint's networks are committed.

    Those of cards for which that compiler is not the one to choose stand in for others in predictions only.
    """
    model, made = checkpoint.model, []
    chosen = {sm(capability) for capability in TENSORRT_RTX.preferred}
    for document in (d for d in committed() if d.model == model.name and d.target in chosen):
        engine = f"{document.compiler.rpartition(' ')[0]}, {document.target}"
        alike = (document.model, document.target)
        streamed = [other for other in committed_streamed() if (other.model, other.target) == alike]
        cost_of = DocumentCosts([document, *streamed], vae_levels(checkpoint.configs))
        made.append(ways_of_compiled(model, engine, cost_of, whole_video(document), cost_of.slices))
    return made


class PlanRow(StrictModel):
    """The fastest way that fits into a card; of one that fits in none, what the smallest takes."""

    memory: int  # GB
    card: str  # whose speed is meant
    video: str
    engine: str
    networks: str = ""  # these four are empty where it does not fit
    guidance: str = ""
    decoder: str = ""
    ratio: float | None = None  # predicted time over that of the fastest way of the same video and engine
    seconds: float | None = None  # predicted, at least
    peak_bytes: int
    largest: str  # the network of that peak
    source: str


class PlansDocument(StrictModel):
    """Every row of `svd-bench tiers --plans`."""

    rows: tuple[PlanRow, ...]


def read_plans(path: Path) -> PlansDocument:
    """Raises SettingsError for what is no such document."""
    try:
        return PlansDocument.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"plans {path}",
            expected="a document that `svd-bench tiers --plans --out FOLDER` wrote",
            got=str(error).partition("\n")[0],
            remedy="Write it anew.",
        ) from error


def plans_document(all_ways: Sequence[Ways], cards: Mapping[int, str] = CARD_OF) -> PlansDocument:
    named = [(memory, card_named(name)) for memory, name in cards.items()]
    return PlansDocument(rows=tuple(_row(memory, card, ways) for memory, card in named for ways in all_ways))


def _row(memory: int, card: Card, ways: Ways) -> PlanRow:
    plan = ways.within(AUTO_SHARE * memory * 2**30)
    shown = plan or ways.smallest
    largest = max(shown.stages, key=lambda stage: stage.peak_bytes)
    known = {
        "memory": memory, "card": card.name, "video": ways.video, "engine": ways.engine,
        "peak_bytes": shown.peak_bytes, "largest": largest.network, "source": shown.stages[0].source,
    }  # fmt: skip
    if plan is None:
        return PlanRow.model_validate(known)
    ratio = plan.cost / ways.fastest.cost
    way = {"networks": plan.residency.name, "guidance": plan.profile.guidance, "decoder": plan.decoding}
    predicted = {"ratio": round(ratio, 4), "seconds": round(ratio * ways.seconds(card), 2)}
    return PlanRow.model_validate(known | way | predicted)


def plans_table(document: PlansDocument) -> Table:
    header = ["card", "video", "engine", "networks", "guidance", "decoder", "peak", "known from"]
    return Table(
        "How a video runs on cards of each memory size, exact",
        [*header, "predicted time", "predicted s, at least", "on"],
        [_cells(row) for row in document.rows],
        left=6,
        note=f"Planned and predicted, not measured: the fastest way below {AUTO_SHARE:.0%} of the card's "
        "memory, the rest being the system's.\nEvery way makes the same video. Predicted time: over that of "
        "the fastest way of the same video and engine.\nPredicted s: 25 steps at the peak rates of the card "
        "in the last column, of TensorRT from its kernels, of torch from counted\noperations. No card "
        "reaches its peak: expect more, and do not compare engines by it: only TensorRT's figure knows what "
        "kernels read and write.\nWhat crosses the bus is counted as if nothing ran meanwhile: offloaded, "
        "the denoiser's weights in every evaluation; streamed, the\ndecoder's parked activations.\n"
        "TensorRT's own compiler was not at hand: its plans say what they take when they are built "
        "(`svd-engine plan BUNDLE`).",
    )


def _cells(row: PlanRow) -> list[str]:
    fits = row.seconds is not None
    way = (
        [row.networks, row.guidance, row.decoder]
        if fits
        else ["does not fit", "-", f"{row.largest} takes most"]
    )
    return [
        f"{row.memory} GB", row.video, row.engine, *way, size(row.peak_bytes), row.source,
        "-" if row.ratio is None else f"{row.ratio:.2f}x",
        "-" if row.seconds is None else f"{row.seconds:.1f}", row.card,
    ]  # fmt: skip


def _video(model: Model) -> str:
    return f"{model.name}, {model.frames} x {model.height} x {model.width}"


def _call(model: Model) -> Settings:
    return Settings(
        frames=model.frames, height=model.height, width=model.width, rho=model.rho,
        min_guidance_scale=model.min_guidance_scale, max_guidance_scale=model.max_guidance_scale,
    )  # fmt: skip
