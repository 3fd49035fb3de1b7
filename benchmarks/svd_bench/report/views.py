"""The tables of one scope.  A view is empty when nothing that it shows was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from svd_bench.documents.results import STAGES, OutOfMemory, Results, Row
from svd_bench.documents.scopes import CAP, Scope, scopes
from svd_bench.documents.table import Table, figure, gibibytes, milliseconds, percent, ratio
from svd_bench.report.remarks import of_times, of_videos

OURS = "svd-engine"
RATIO = "of diffusers' time"
PAIRED = (
    "Of diffusers' time: the median of the rounds that both shared, below 1 is faster; in brackets the "
    "lowest and the highest round. Where they lie around 1, no difference was seen."
)
UNPAIRED = "Of diffusers' time is a ratio of medians here, without spread: this document kept no rounds."
VRAM = ["peak VRAM (driver)", "peak VRAM (torch)"]


def videos(scope: Scope) -> list[Table]:
    """The whole video: what a user waits for, and what it takes."""
    rows = [row for row in scope.rows if row.stage == "whole_video"] if scope.kind == "run" else []
    cells = [
        [
            label(row), row.dtype, median(row), interval(row), milliseconds(row.first_call_ms),
            figure(3.6e6 / row.latency_ms.median * row.setting.batch), *vram(row),
            gibibytes(row.peak_host_bytes), "-" if row.energy_j is None else f"{row.energy_j:.0f} J",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "",
        "dtype",
        "median",
        "p10 to p90",
        "first call",
        "videos an hour",
        *VRAM,
        "peak host",
        "energy",
    ]
    note = "\n".join([*of_times(rows), *of_videos(scope)])
    return _table("A whole video", header, cells, left=2, note=note)


def peers(scope: Scope) -> list[Table]:
    """What both we and others ran in one dtype, with the same ratio to diffusers as everywhere."""
    found = contested(scope)
    tables = []
    for dtype in dict.fromkeys(dtype for _, dtype in found):
        here = {stage: rows for (stage, of), rows in found.items() if of == dtype}
        names = list(dict.fromkeys(label(row) for rows in here.values() for row in rows))
        cells = []
        for stage, rows in here.items():
            shown = {label(r): ", ".join([median(r), *_ratio(r)]) for r in rows}
            cells.append([stage, *(shown.get(name, "-") for name in names)])
        note = how_compared([row for rows in here.values() for row in rows])
        tables += _table(f"Ours against peers, {dtype}", ["stage", *names], cells, note=note)
    return tables


def stages(scope: Scope) -> list[Table]:
    rows = [row for row in scope.rows if row.stage != "whole_video" and scope.kind == "run"]
    cells = [
        [
            row.stage, label(row), row.dtype, median(row), interval(row), milliseconds(row.first_call_ms),
            of_diffusers(row), *vram(row), difference(row),
        ]
        for row in sorted(rows, key=order)
    ]  # fmt: skip
    header = ["stage", "of", "dtype", "median", "p10 to p90", "first call", RATIO, *VRAM, "max difference"]
    calls = (
        "A denoiser step is one call of the network, a VAE decode one chunk of frames, the sampler all steps."
    )
    note = "\n".join([calls, *filter(None, [how_compared(rows)]), *of_times(rows)])
    return _table("Stages", header, cells, left=3, note=note)


def ladder(scope: Scope) -> list[Table]:
    """One table a stage, from the bottom up."""
    tables = []
    for stage, rows in by_stage(scope.rows if scope.kind == "ladder" else ()).items():
        cells = [
            [
                rung(row), row.dtype, median(row), interval(row), of_diffusers(row),
                percent(row.share_of_ceiling), *vram(row), difference(row),
            ]
            for row in rows
        ]  # fmt: skip
        header = ["rung", "dtype", "median", "p10 to p90", RATIO, "of the ceiling", *VRAM, "max difference"]
        note = "\n".join([*filter(None, [how_compared(rows)]), *of_times(rows)])
        tables += _table(f"Ladder of optimisations: {stage}", header, cells, left=2, note=note)
    return tables


def limit(scope: Scope) -> list[Table]:
    """Share of the rate that the same machine's matrix products reached in the same run."""
    cells = [
        [
            row.stage, label(row), row.dtype, percent(row.share_of_ceiling), median(row),
            "-" if row.flop is None else figure(row.flop / 1e12),
            "-" if row.flop is None else figure(row.flop / row.latency_ms.median / 1e9),
        ]
        for row in limited(scope)
    ]  # fmt: skip
    header = ["stage", "of", "dtype", "share of the ceiling", "median", "TFLOP", "TFLOP/s"]
    return _table("Share of the limit", header, cells, left=3)


def tiers(scope: Scope) -> list[Table]:
    cells = [
        [*_asked(row), "fits", str(row.setting.decode_chunk), *vram(row), median(row), interval(row)]
        for row in capped(scope)
    ]
    cells += [
        [*_asked(m), f"does not fit ({m.stopped_in})", str(m.setting.decode_chunk), "-", "-", "-", "-"]
        for m in scope.misfits
    ]
    cells.sort(key=lambda row: float(row[0].removesuffix(" GB")))
    header = [
        "emulated cap", "backend", "guidance", "networks", "", "decode chunk", *VRAM, "a video, on this GPU",
        "p10 to p90",
    ]  # fmt: skip
    note = "The cap binds torch's allocator on a larger GPU; the latency is that GPU's, not a small card's."
    return _table("What fits by memory tier", header, cells, left=5, note=note)


def _asked(row: Row | OutOfMemory) -> list[str]:
    return [row.note.removeprefix(CAP), row.backend, row.setting.guidance, row.setting.networks]


VIEWS: dict[str, Callable[[Scope], list[Table]]] = {
    "videos": videos, "peers": peers, "stages": stages, "ladder": ladder, "limit": limit, "tiers": tiers,
}  # fmt: skip


def tables_of(document: Results) -> list[Table]:
    """Every view of every scope of a document."""
    return [table for scope in scopes(document) for view in VIEWS.values() for table in view(scope)]


def label(row: Row) -> str:
    return f"{row.subject} ({row.backend})"


def rung(row: Row) -> str:
    return f"{label(row)}, {row.note or 'as published'}"


def median(row: Row) -> str:
    return milliseconds(row.latency_ms.median)


def interval(row: Row) -> str:
    spread = row.latency_ms
    return "one run" if spread.runs == 1 else f"{milliseconds(spread.p10)} to {milliseconds(spread.p90)}"


def of_diffusers(row: Row) -> str:
    r = row.of_diffusers
    return "-" if r is None else ratio(r.median, r.low, r.high, r.differs)


def how_compared(rows: Sequence[Row]) -> str:
    """What a reader must know of these rows' ratios; nothing where there are none but diffusers' own."""
    ratios = [row.of_diffusers for row in rows if row.of_diffusers and row.subject != "diffusers"]
    if not ratios:
        return ""
    return PAIRED if all(r.rounds for r in ratios) else UNPAIRED


def _ratio(row: Row) -> list[str]:
    return [] if row.of_diffusers is None else [of_diffusers(row)]


def vram(row: Row) -> list[str]:
    return [gibibytes(row.peak_driver_bytes), gibibytes(row.peak_torch_bytes)]


def difference(row: Row) -> str:
    return "-" if row.max_abs_difference is None else f"{row.max_abs_difference:.1e}"


def order(row: Row) -> int:
    return STAGES.index(row.stage) if row.stage in STAGES else len(STAGES)


def by_stage(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=order):
        found.setdefault(row.stage, []).append(row)
    return found


def contested(scope: Scope) -> dict[tuple[str, str], list[Row]]:
    """By stage and dtype, networks and videos that both sides ran; peers first, else in document order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(scope.rows if scope.kind == "run" else (), key=lambda r: (order(r), r.subject == OURS)):
        found.setdefault((row.stage, row.dtype), []).append(row)
    both = {key: rows for key, rows in found.items() if {OURS} < {row.subject for row in rows}}
    return {key: rows for key, rows in both.items() if key[0] != "sampler"}  # arithmetic, of no backend


def limited(scope: Scope) -> list[Row]:
    rows = [row for row in scope.rows if row.share_of_ceiling is not None and scope.kind == "run"]
    return sorted(rows, key=order)


def capped(scope: Scope) -> list[Row]:
    return [row for row in scope.rows if row.stage == "whole_video"] if scope.kind == "tiers" else []


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1, note: str = ""
) -> list[Table]:
    """Without columns that hold nothing; no table without rows."""
    if not rows:
        return []
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in rows)]
    cells = [[row[i] for i in kept] for row in rows]
    return [Table(title, [header[i] for i in kept], cells, sum(i < left for i in kept), note)]
