"""What `svd-bench quality` writes and shows: figures with their bounds, each video's motion, settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from svd_bench.documents.results import Environment
from svd_bench.documents.strict import StrictModel
from svd_bench.documents.table import Table, figure, milliseconds

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


def decibels(value: float) -> str:
    return f"{value:.1f}" if np.isfinite(value) else "equal"
