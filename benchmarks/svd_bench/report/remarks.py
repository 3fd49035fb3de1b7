"""What a reader must be told of timings before believing them: side by side they may look like results."""

from __future__ import annotations

from collections.abc import Sequence

from svd_bench.cards.predict import NEEDED, calls
from svd_bench.documents.results import Row
from svd_bench.documents.scopes import Scope
from svd_bench.documents.table import milliseconds, times

WIDE = 1.25  # p90 over p10 of one subject: more, and something besides it took time
APART = 0.15  # share of the whole video's time that its stages may miss or exceed


def of_times(rows: Sequence[Row]) -> list[str]:
    """One remark for each row whose own calls took very different times."""
    return [
        f"Remark: {_name(row)} took from {milliseconds(row.latency_ms.p10)} to "
        f"{milliseconds(row.latency_ms.p90)} (p10 to p90): something else used the machine, or its clock "
        "moved."
        for row in rows
        if row.latency_ms.p90 > WIDE * row.latency_ms.p10
    ]


def of_videos(scope: Scope) -> list[str]:
    """One remark for each whole video that its stages do not add up to."""
    remarks = []
    for whole in (row for row in scope.rows if row.stage == "whole_video"):
        parts = stages_of(whole, scope)
        share = whole.latency_ms.median / parts if parts else 1.0
        if parts and abs(share - 1) > APART:
            remarks.append(
                f"Remark: {_name(whole)} took {milliseconds(whole.latency_ms.median)}, its stages add up to "
                f"{milliseconds(parts)} ({times(share)}): they were not measured under the same load, or "
                "something between them takes time."
            )
    return remarks


def stages_of(whole: Row, scope: Scope) -> float | None:
    """Milliseconds: each network's median times its calls of one video, and the sampler's arithmetic.

    None unless all four networks were measured, and where the halves of guidance are calls of their own: a
    step may be one or two.
    """
    setting = whole.setting
    networks = {
        row.stage: row.latency_ms.median * calls(row, setting.steps)
        for row in scope.rows
        if (row.subject, row.backend) == (whole.subject, whole.backend)
        and row.stage in NEEDED
        and (row.dtype == whole.dtype or row.stage == "vae_encoder")  # that is float32 in every dtype
    }
    if networks.keys() != NEEDED.keys() or setting.guidance == "single":
        return None
    between = [r.latency_ms.median for r in scope.rows if (r.stage, r.subject) == ("sampler", whole.subject)]
    return sum(networks.values()) + sum(between[:1])


def _name(row: Row) -> str:
    note = f", {row.note}" if row.note else ""
    return f"{row.stage}, {row.subject} ({row.backend}, {row.dtype}{note})"
