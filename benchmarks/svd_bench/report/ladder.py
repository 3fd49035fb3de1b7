"""What `svd-bench ladder` prints: one table a network, rung by rung, with the floor of its time."""

from __future__ import annotations

from collections.abc import Sequence

from svd_bench.documents.results import Results, Row
from svd_bench.documents.table import Table, gibibytes, milliseconds, percent
from svd_bench.report.remarks import of_times
from svd_bench.report.views import RATIO, how_compared, of_diffusers


def ladder_tables(results: Results) -> list[Table]:
    """One table a network; the last column but one is the share of what this machine can do at most."""
    tables = []
    for stage in dict.fromkeys(row.stage for row in results.rows):
        rows = [row for row in results.rows if row.stage == stage]
        tables.append(_table(results, stage, rows))
    return tables


def _table(results: Results, stage: str, rows: Sequence[Row]) -> Table:
    first, ceiling = rows[0], results.ceiling
    note = ""
    if ceiling is not None and first.flop is not None:
        rate = ceiling.best_rate(first.dtype)
        floor = milliseconds(first.flop / rate * 1e3)
        note = (
            f"Floor {floor}: {first.flop / 1e12:.3g} TFLOP, counted over diffusers' module, at "
            f"{rate / 1e12:.3g} TFLOP/s, the best that {first.dtype} products and convolutions reached here."
        )
    s = first.setting
    title = f"{stage}, {s.model}, {s.frames} frames, {s.height}x{s.width}, {first.device}"
    if stage == "vae_decoder":
        title = title.replace(f"{s.frames} frames", f"{s.decode_chunk} frames")
    cells = [
        [
            row.note or "as published", f"{row.subject} {row.backend} {row.dtype}",
            milliseconds(row.latency_ms.median),
            f"{milliseconds(row.latency_ms.p10)} to {milliseconds(row.latency_ms.p90)}",
            of_diffusers(row), percent(row.share_of_ceiling),
            "-" if row.max_abs_difference is None else f"{row.max_abs_difference:.1e}",
            gibibytes(row.peak_driver_bytes or row.peak_host_bytes),
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "rung", "", "median", "p10 to p90", RATIO, "of the floor's rate", "max difference",
        "peak",
    ]  # fmt: skip
    notes = [note, how_compared(rows), *of_times(rows)]
    return Table(title, header, cells, left=2, note="\n".join(filter(None, notes)))
