"""Predicts the latency of a video on cards that are not here, from kernels as compiled.  Never a Row.

A kernel takes the larger of its bytes over the card's bandwidth and its operations over the card's rate, and
a launch; a video is the sum over its kernels.  That is a lower bound, but for tensors that stay in a cache:
peak rates are not reached, and no efficiency is assumed.  Where svd-engine was measured on one card, the
efficiency of each part of the video (bound over measured time) can be taken to hold on others.  A prediction
says nothing about whether a video fits into the card's memory, nor of power limits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from svd_bench.cards.cards import CARDS, Card, card_named
from svd_bench.cards.published import PARTS, PUBLISHED, Part, Published
from svd_bench.documents.results import Results, Row
from svd_engine.errors import SettingsError

NEEDED: dict[str, Part] = {  # rows of a Results document
    "denoiser_step": "denoiser",
    "vae_decoder": "vae_decoder",
    "image_encoder": "encoders",
    "vae_encoder": "encoders",
}
SIZE = (576, 1024)  # pixels, at which others published and svd-engine is measured
PUBLISHED_FRAMES = 25
HALF = ("float16", "bfloat16")
LAUNCH = 1e-6  # seconds between two kernels of a CUDA graph: assumed, in no measurement of ours
STANDS_IN = {"sm90": "sm80"}  # targets that TensorRT for RTX has not

Accumulation = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class Kernels:
    """Kernels that do equally much, or of which only the sum is known."""

    count: int
    bytes: float  # read and written by all of them
    flop: float  # of all of them
    float32: bool = False  # their products are


@dataclass(frozen=True)
class Stage:
    """One network in a video."""

    part: Part
    kernels: tuple[Kernels, ...]  # of one call
    calls: float = 1.0
    each_step: bool = False  # then `calls` are those of one step


@dataclass(frozen=True)
class CompiledVideo:
    """The networks of one video, compiled for `target` and not run."""

    model: str
    frames: int
    height: int  # pixels
    width: int
    target: str  # "sm89"
    compiler: str
    stages: tuple[Stage, ...]
    by_kernel: bool  # else some kernels are known as sums, whose bound is lower still
    guidance: bool = True  # classifier-free, so that a step evaluates two halves

    @property
    def shape(self) -> tuple[str, int, int, int]:
        return self.model, self.frames, self.height, self.width

    @property
    def published(self) -> bool:
        """Whether it is as those of which times were published."""
        return self.guidance and (self.frames, self.height, self.width) == (PUBLISHED_FRAMES, *SIZE)


@dataclass(frozen=True)
class Efficiency:
    """Predicted over measured time of each part of a video of svd-engine; `source` says of which run."""

    parts: dict[Part, float]
    card: str
    source: str


@dataclass(frozen=True)
class Prediction:
    card: Card
    video: CompiledVideo
    steps: int
    seconds: float


@dataclass(frozen=True)
class Check:
    """A prediction beside the published time of the same part of a video."""

    row: Published
    part: Part | None  # None for the whole video
    video: CompiledVideo
    published: float  # seconds
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def kernel_seconds(kernels: Kernels, card: Card, accumulation: Accumulation = "fp32") -> float:
    rate = card.float32_flops if kernels.float32 else card.rate(accumulation)
    return max(kernels.bytes / card.bandwidth, kernels.flop / rate) + kernels.count * LAUNCH


def part_seconds(
    video: CompiledVideo, card: Card, steps: int = 25, accumulation: Accumulation = "fp32"
) -> dict[Part, float]:
    """Without any efficiency."""
    seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
    for stage in video.stages:
        calls = stage.calls * (steps if stage.each_step else 1)
        seconds[stage.part] += calls * sum(kernel_seconds(k, card, accumulation) for k in stage.kernels)
    return seconds


def predict(
    card: Card, video: CompiledVideo, efficiency: Efficiency | None = None, steps: int = 25
) -> Prediction:
    parts = part_seconds(video, card, steps)
    shares = efficiency.parts if efficiency else dict.fromkeys(PARTS, 1.0)
    return Prediction(card, video, steps, sum(seconds / shares[part] for part, seconds in parts.items()))


def compiled_for(card: Card, videos: Collection[CompiledVideo]) -> CompiledVideo:
    """Of the same video for several targets the card's own or its stand-in, else the next older, else any."""
    wanted = _number(STANDS_IN.get(card.target, card.target))
    known = {_number(video.target): video for video in videos}
    return known[max((number for number in known if number <= wanted), default=min(known))]


def predictions(
    videos: Collection[CompiledVideo], efficiency: Efficiency | None = None, steps: int = 25
) -> dict[str, list[Prediction]]:
    """By card, one for each of `shapes`; a card that was measured itself is left out."""
    measured = efficiency.card if efficiency else ""
    alike = [[v for v in videos if v.shape == shape] for shape in shapes(videos)]
    return {
        card.name: [predict(card, compiled_for(card, of), efficiency, steps) for of in alike]
        for card in CARDS
        if card.name != measured
    }


def shapes(videos: Iterable[CompiledVideo]) -> list[tuple[str, int, int, int]]:
    """Models and sizes, each once, fewest frames first."""
    return sorted({video.shape for video in videos}, key=lambda shape: shape[1:])


def checks(videos: Iterable[CompiledVideo]) -> list[Check]:
    """Every published time, and its parts; none when no video has the published size.

    The stacks behind them ran graphs of their own: the prediction is what our kernels could do on that card.
    """
    alike = [video for video in videos if video.published]
    made = []
    for row in PUBLISHED if alike else ():
        card = card_named(row.card)
        video = compiled_for(card, alike)
        parts = part_seconds(video, card, accumulation=row.accumulation)
        made.append(Check(row, None, video, row.seconds, sum(parts.values())))
        made += [Check(row, p, video, seconds, parts[p]) for p, seconds in (row.parts or {}).items()]
    return made


def of_measured(results: Results, videos: Collection[CompiledVideo]) -> Efficiency:
    """From a run of ours on a GPU, of the backend that was fastest over a whole video there.

    It needs half-precision rows of all four networks at 576x1024, frames as in one of `videos`, batch 1,
    batched guidance.  Raises SettingsError when they are not there, or the card is not in the data.
    """
    card = card_named(results.environment.device)
    compiled = {v.frames: compiled_for(card, [o for o in videos if o.shape == v.shape])
                for v in videos if (v.height, v.width) == SIZE}  # fmt: skip
    whole = {}
    for backend, dtype, setting in dict.fromkeys((r.backend, r.dtype, r.setting) for r in results.rows):
        rows = [r for r in results.rows if _usable(r) and (r.backend, r.setting) == (backend, setting)]
        rows = [r for r in rows if r.dtype == dtype or r.stage == "vae_encoder"]  # always float32
        if dtype in HALF and setting.frames in compiled and {r.stage for r in rows} == set(NEEDED):
            whole[backend, dtype, setting.frames] = _seconds(rows)
    if not whole:
        counts = " or ".join(map(str, sorted(compiled))) or "compiled numbers of"
        raise SettingsError(
            "measured results",
            expected=f"svd-engine rows of {', '.join(NEEDED)} on a GPU in {' or '.join(HALF)}, at "
            f"{SIZE[0]}x{SIZE[1]}, {counts} frames, batch 1, batched guidance",
            got=f"{len(results.rows)} rows on {results.environment.device}, no complete set among them",
            remedy="Measure with `svd-bench run --random-weights svd-xt` on a GPU.",
        )
    backend, dtype, frames = min(whole, key=lambda key: sum(whole[key].values()) / key[2])
    times, video = whole[backend, dtype, frames], compiled[frames]
    parts = {part: seconds / times[part] for part, seconds in part_seconds(video, card).items()}
    source = f"measured: svd-engine, {backend}, {dtype}, {frames} frames, on {card.name}"
    return Efficiency(parts, card.name, source)


def _usable(row: Row) -> bool:
    setting = row.setting
    return (
        row.subject == "svd-engine"
        and row.stage in NEEDED
        and row.device.startswith("cuda")
        and not row.note  # an emulated cap
        and (setting.height, setting.width) == SIZE
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


def _number(target: str) -> int:
    return int(target.removeprefix("sm"))
