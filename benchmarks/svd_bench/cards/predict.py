"""Predicts the latency of a video on cards that are not here.  A prediction is never a Row.

A stage's ideal time on a card is its FLOP over the card's peak rate plus its other bytes over the card's
bandwidth, one after the other as kernels run.  Efficiency is ideal over real time, one number per stage;
it is taken from one card where the real time is known, and assumed to hold on every other.  It says
nothing about whether a video fits into the card's memory, nor of power limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from svd_bench.cards.cards import CARDS, Card, card_named
from svd_bench.cards.work import FRAMES, PARTS, PUBLISHED, Part, Published, Work, video
from svd_bench.documents.results import Results, Row
from svd_engine.errors import SettingsError

NEEDED: dict[str, Part] = {  # rows of a Results document
    "denoiser_step": "denoiser",
    "vae_decoder": "vae_decoder",
    "image_encoder": "encoders",
    "vae_encoder": "encoders",
}
SIZE = (576, 1024)  # pixels, at which the work was counted
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Efficiency:
    """Ideal over real time of each stage; `source` says whose times and on which card."""

    stages: dict[Part, float]
    card: str
    source: str
    measured: bool = False  # of svd-engine, in a document of ours; else published of another


@dataclass(frozen=True)
class Prediction:
    card: Card
    frames: int
    steps: int
    seconds: float  # a video


@dataclass(frozen=True)
class Validation:
    """The model held against a published time; `predicted` is None for the row it was fitted to."""

    row: Published
    efficiency: Efficiency
    predicted: float | None

    @property
    def error(self) -> float | None:
        return None if self.predicted is None else self.predicted / self.row.seconds - 1


def ideal_seconds(work: Work, card: Card, accumulation: Literal["fp16", "fp32"] = "fp32") -> float:
    return work.flop / card.rate(accumulation) + work.bytes / card.bandwidth


def predict(
    card: Card,
    efficiency: Efficiency,
    frames: int,
    steps: int = 25,
    accumulation: Literal["fp16", "fp32"] = "fp32",
) -> Prediction:
    seconds = sum(
        ideal_seconds(work, card, accumulation) / efficiency.stages[stage]
        for stage, work in video(frames, steps).items()
    )
    return Prediction(card, frames, steps, seconds)


def of_published(row: Published) -> Efficiency:
    """Of each stage where the row splits its time, else one for all stages."""
    card = card_named(row.card)
    ideal = {s: ideal_seconds(w, card, row.accumulation) for s, w in video(25).items()}
    if row.stages is None:
        one = sum(ideal.values()) / row.seconds
        stages: dict[Part, float] = dict.fromkeys(PARTS, one)
    else:
        stages = {stage: ideal[stage] / row.stages[stage] for stage in PARTS}
    return Efficiency(stages, row.card, f"published: {row.stack} on {row.card} ({row.source})")


def assumed() -> Efficiency:
    """Without a measurement: of TensorRT on an A100, the only lossless stack published stage by stage."""
    return of_published(next(row for row in PUBLISHED if row.stages is not None))


def validations() -> list[Validation]:
    """Each kind of stack is fitted to its time on the A100 80GB SXM; its other times are predicted."""
    made = []
    for kind in dict.fromkeys(row.kind for row in PUBLISHED):
        fitted, *others = sorted(
            (row for row in PUBLISHED if row.kind == kind), key=lambda row: row.card != "A100 80GB SXM"
        )
        efficiency = of_published(fitted)
        made.append(Validation(fitted, efficiency, None))
        for row in others:
            seconds = predict(card_named(row.card), efficiency, 25, 25, row.accumulation).seconds
            made.append(Validation(row, efficiency, seconds))
    return made


def of_measured(results: Results) -> Efficiency:
    """From a run of ours on a GPU, of the backend that was fastest over a whole video there.

    It needs half-precision rows of all four networks at 576x1024, 14 or 25 frames, batch 1, batched
    guidance.  Raises SettingsError when they are not there, or the card is not in the data.
    """
    card = card_named(results.environment.device)
    whole = {}
    for backend, dtype, setting in dict.fromkeys((r.backend, r.dtype, r.setting) for r in results.rows):
        rows = [r for r in results.rows if _usable(r) and (r.backend, r.setting) == (backend, setting)]
        rows = [r for r in rows if r.dtype == dtype or r.stage == "vae_encoder"]  # always float32
        if dtype in HALF and {r.stage for r in rows} == set(NEEDED):
            whole[backend, dtype, setting.frames] = _seconds(rows)
    if not whole:
        raise SettingsError(
            "measured results",
            expected=f"svd-engine rows of {', '.join(NEEDED)} on a GPU in {' or '.join(HALF)}, at "
            f"{SIZE[0]}x{SIZE[1]}, {' or '.join(map(str, FRAMES))} frames, batch 1, batched guidance",
            got=f"{len(results.rows)} rows on {results.environment.device}, no complete set among them",
            remedy="Measure with `svd-bench run --random-weights svd-xt` on a GPU.",
        )
    backend, dtype, frames = min(whole, key=lambda key: sum(whole[key].values()) / key[2])
    times = whole[backend, dtype, frames]
    stages = {stage: ideal_seconds(work, card) / times[stage] for stage, work in video(frames).items()}
    source = f"measured: svd-engine, {backend}, {dtype}, {frames} frames, on {card.name}"
    return Efficiency(stages, card.name, source, measured=True)


def predictions(efficiency: Efficiency, steps: int = 25) -> dict[str, list[Prediction]]:
    """By card, for 14 and 25 frames; a card that was measured itself is left out."""
    measured = efficiency.card if efficiency.measured else ""
    return {c.name: [predict(c, efficiency, f, steps) for f in FRAMES] for c in CARDS if c.name != measured}


def _usable(row: Row) -> bool:
    setting = row.setting
    return (
        row.subject == "svd-engine"
        and row.stage in NEEDED
        and row.device.startswith("cuda")
        and not row.note  # an emulated cap
        and (setting.height, setting.width) == SIZE
        and setting.frames in FRAMES
        and (setting.batch, setting.guidance) == (1, "batched")
    )


def calls(row: Row, steps: int) -> float:
    """Of its network in one video: a row of the decoder is one chunk, a shorter last chunk its share."""
    setting = row.setting
    if row.stage == "vae_decoder":
        return setting.frames / min(setting.decode_chunk, setting.frames)
    return steps if row.stage == "denoiser_step" else 1


def _seconds(rows: list[Row]) -> dict[Part, float]:
    """Of a video of 25 steps."""
    times: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    for row in rows:
        times[NEEDED[row.stage]] += row.latency_ms.median / 1e3 * calls(row, 25)
    return times
