"""What `svd-bench quality` writes and shows: figures with their bounds, each video's motion, settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from svd_bench.documents.results import Environment, Ratio
from svd_bench.documents.strict import StrictModel
from svd_bench.documents.table import Table, figure, milliseconds, percent, ratio

BUCKETS = (20, 127, 220)  # motion buckets that every photograph gets a video of


@dataclass(frozen=True)
class Metric:
    """A figure and the value that it must reach; `must` is None where it is for information."""

    name: str
    value: float
    must: float | None = None
    better: Literal["more", "less"] = "more"

    @property
    def met(self) -> bool | None:
        if self.must is None:
            return None
        return self.value >= self.must if self.better == "more" else self.value <= self.must


@dataclass(frozen=True)
class Motion:
    """How one video moves: mean optical flow, pixels a frame; largest of a frame over their median."""

    photograph: str
    bucket: int
    flow: float
    jump: float


@dataclass(frozen=True)
class Difference:
    """A setting against float32 in eager torch: decibels, [0, 1], pixels a frame, seconds."""

    setting: str
    psnr: float
    ssim: float
    flow: float
    seconds: float


@dataclass(frozen=True)
class Sampled:
    """A sampler over a schedule at so many steps, against the reference; means over the photographs.

    psnr in decibels, ssim in [0, 1], flow: difference, pixels a frame.  psnr_exact: against the most steps
    of dpmpp-2m, of second order.  warping: what motion does not explain in the videos themselves, root mean
    square of pixels in [0, 1].
    """

    sampler: str
    schedule: str
    steps: int
    evaluations: int  # of the denoiser
    psnr: float
    psnr_exact: float
    ssim: float
    flow: float
    warping: float

    @property
    def name(self) -> str:
        return f"{self.sampler}, {self.schedule}"


class SamplersDocument(StrictModel):
    """What `svd-bench quality --samplers` writes."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    environment: Environment
    checkpoint: str
    photographs: list[str]
    frames: int
    height: int
    width: int
    budgets: list[int]  # evaluations that a row may take at most
    reference: Sampled
    rows: list[Sampled]

    def by_name(self) -> dict[str, list[Sampled]]:
        """Rows of each sampler over each schedule, in the order of their evaluations."""
        found: dict[str, list[Sampled]] = {}
        for row in sorted(self.rows, key=lambda row: row.evaluations):
            found.setdefault(row.name, []).append(row)
        return {name: found[name] for name in dict.fromkeys(row.name for row in self.rows)}


@dataclass(frozen=True)
class Reused:
    """A setting of reuse against the whole denoiser, at the same steps.

    psnr, ssim, flow, warping: as in `Sampled`.  time: of the denoiser, over the whole one's.  shallow_share:
    operations of a shallow step over a whole one's, here and for SVD-XT at 25 frames of 576x1024.
    """

    interval: int
    branch: int
    threshold: float | None
    evaluations: int
    shallow: int
    psnr: float
    ssim: float
    flow: float
    warping: float
    time: Ratio
    shallow_share: float
    shallow_share_svd: float

    @property
    def name(self) -> str:
        threshold = "" if self.threshold is None else f", threshold {self.threshold:g}"
        return f"reuse {self.interval}, branch {self.branch}{threshold}"

    @property
    def share_svd(self) -> float:
        """Operations of all evaluations over those without reuse, for SVD-XT."""
        return 1 - self.shallow / self.evaluations * (1 - self.shallow_share_svd)


class ClipDocument(StrictModel):
    """Ways to make one clip, of `frames` and `steps`, from one photograph."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    environment: Environment
    checkpoint: str
    photograph: str
    frames: int
    height: int
    width: int
    steps: int


class ReuseDocument(ClipDocument):
    """What `svd-bench quality --reuse` writes."""

    warping: float  # of the whole denoiser's video
    rows: list[Reused]


@dataclass(frozen=True)
class Rounded:
    """Half precision with some rewrites of its bundles against float32, at the same steps.

    psnr in decibels over all frames, worst_psnr of the frame with the least; ssim, flow: as in `Sampled`.
    """

    rung: str
    psnr: float
    worst_psnr: float
    ssim: float
    flow: float


class HalfDocument(ClipDocument):
    """What `svd-bench quality --half` writes."""

    rows: list[Rounded]


class QualityDocument(StrictModel):
    """What `svd-bench quality` writes."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    environment: Environment
    checkpoint: str
    figures: list[Metric]
    motions: list[Motion]
    settings: list[Difference]


def quality_tables(document: QualityDocument) -> list[Table]:
    held = [
        [
            f.name,
            figure(f.value),
            "" if f.must is None else f"{'>=' if f.better == 'more' else '<='} {figure(f.must)}",
            {True: "yes", False: "no", None: ""}[f.met],
        ]
        for f in document.figures
    ]
    beside = [
        [d.setting, decibels(d.psnr), f"{d.ssim:.4f}", f"{d.flow:.3f}", milliseconds(d.seconds * 1e3)]
        for d in document.settings
    ]
    moves: dict[str, list[Motion]] = {}
    for m in document.motions:
        moves.setdefault(m.photograph, []).append(m)
    moved = [[name, *(f"{m.flow:.2f} ({m.jump:.1f})" for m in those)] for name, those in moves.items()]
    over_all = [f"{np.mean([m.flow for m in those]):.2f}" for those in zip(*moves.values(), strict=True)]
    return [
        Table("Quality on held-out photographs", ("figure", "value", "must be", "met"), held),
        Table(
            "Optical flow of each video, pixels a frame",
            ("photograph", *(f"motion bucket {bucket}" for bucket in BUCKETS)),
            [*moved, ["mean", *over_all]] if moved else [],
            note="In brackets a frame's flow over its clip's median, largest.",
        ),
        Table(
            "Settings that are not exact",
            ("setting", "PSNR, dB", "SSIM", "flow difference, px a frame", "time"),
            beside,
            note="Against the first row, on one photograph. Times of one call each.",
        ),
    ]


def samplers_tables(document: SamplersDocument) -> list[Table]:
    """PSNR of all in one table, then every figure."""
    budgets = document.budgets
    short = []
    for name, rows in document.by_name().items():
        best = {b: [row for row in rows if row.evaluations <= b][-1] for b in budgets}
        short.append([name, *(decibels(best[b].psnr) for b in budgets)])
    whole = [
        [
            row.name, str(row.steps), str(row.evaluations), decibels(row.psnr), f"{row.ssim:.4f}",
            f"{row.flow:.3f}", f"{row.warping:.4f}", decibels(row.psnr_exact),
        ]
        for row in (document.reference, *document.rows)
    ]  # fmt: skip
    reference = document.reference
    against = f"Against {reference.evaluations} evaluations of {reference.name}"
    return [
        Table(
            "Quality per evaluation: PSNR, dB",
            ("sampler, schedule", *(f"{b} evaluations" for b in budgets)),
            short,
            note=f"{against}. A sampler of two evaluations a step takes the most steps that fit in.",
        ),
        Table(
            "Quality per evaluation: every figure",
            (
                "sampler, schedule", "steps", "evaluations", "PSNR, dB", "SSIM",
                "flow difference, px a frame", "warping error", "PSNR against dpmpp-2m, dB",
            ),
            whole,
            note=f"{against}. {', '.join(document.photographs)}: {document.frames} frames of "
            f"{document.height}x{document.width}.",
        ),
    ]  # fmt: skip


def reuse_table(document: ReuseDocument) -> Table:
    rows = [
        [
            row.name, f"{row.shallow} of {row.evaluations}", decibels(row.psnr), f"{row.ssim:.4f}",
            f"{row.flow:.3f}", f"{row.warping:.4f}",
            ratio(row.time.median, row.time.low, row.time.high, row.time.differs),
            percent(row.shallow_share), percent(row.shallow_share_svd), percent(row.share_svd),
        ]
        for row in document.rows
    ]  # fmt: skip
    return Table(
        "Reuse between evaluations",
        (
            "setting", "shallow", "PSNR, dB", "SSIM", "flow difference, px a frame", "warping error",
            "denoiser's time", "shallow step's operations", "for SVD-XT", "all steps for SVD-XT",
        ),
        rows,
        note=f"Against the whole denoiser in every one of {document.steps} steps of euler, whose warping "
        f"error is {document.warping:.4f}. {document.photograph}: {document.frames} frames of "
        f"{document.height}x{document.width}, eager torch. Operations are counted, of guided steps; those of "
        "SVD-XT at 25 frames of 576x1024.",
    )  # fmt: skip


def half_table(document: HalfDocument) -> Table:
    rows = [
        [row.rung, f"{row.psnr:.2f}", f"{row.worst_psnr:.2f}", f"{row.ssim:.4f}", f"{row.flow:.3f}"]
        for row in document.rows
    ]
    size = f"{document.frames} frames of {document.height}x{document.width}"
    return Table(
        "Half precision, the rewrites added one at a time",
        ("rung", "PSNR, dB", "of the worst frame", "SSIM", "flow difference, px a frame"),
        rows,
        note="float16 in torch, with sums in float32, against float32 without rewrites: "
        f"{document.steps} steps of euler. {document.photograph}: {size}.",
    )


def decibels(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "equal"
