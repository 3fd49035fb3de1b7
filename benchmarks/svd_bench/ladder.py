"""The ladder: the exact rewrites added one at a time, every rung timed beside diffusers' own module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from svd_bench.contest import Bench, contest
from svd_bench.floor import best_rate, stage_flop
from svd_bench.one_graph import exported
from svd_bench.opening import stage_spec
from svd_bench.remarks import of_times
from svd_bench.results import Results, Row, Setting
from svd_bench.stages import reference_output
from svd_bench.subjects import Case, Subject, checkpoint_of
from svd_bench.table import Table, gibibytes, milliseconds, percent
from svd_bench.views import RATIO, how_compared, of_diffusers
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import DType, Precision

Rungs = Literal["all", "ends"]
LADDERS = ("eager", "compiled", "onnxruntime")  # backends that run one network by itself
STAGE_OF = {"unet": "denoiser_step", "vae_decoder": "vae_decoder"}


def measure_ladder(
    bench: Bench,
    peer: Subject,
    dtype: DType,
    setting: Setting,
    networks: Sequence[str],
    backends: Sequence[str],
    rungs: Rungs,
) -> None:
    """Puts diffusers' row and one a rung and backend into the recorder, network after network.

    `peer` is diffusers, eager; ours compute in `dtype`, which may be another.  On the CPU the reference of
    outputs is diffusers' float32, elsewhere the peer itself.
    """
    checkpoint = checkpoint_of(peer.checkpoint, peer.variant)
    architecture = checkpoint.model.architecture
    for network in networks:
        stage = STAGE_OF[network]
        anchor = Case(subject=peer, stage=stage, setting=setting)
        reference = None
        if bench.device.type == "cpu" and peer.dtype != "float32":
            exact = peer.model_copy(update={"dtype": "float32"})
            reference = reference_output(bench, Case(subject=exact, stage=stage, setting=setting))
        flop = stage_flop(stage, setting, architecture, checkpoint.configs)
        contest(
            bench, cases(bench, anchor, dtype, architecture, backends, rungs), reference, flop, skip_same=True
        )


def cases(
    bench: Bench,
    anchor: Case,
    dtype: DType,
    architecture: Architecture,
    backends: Sequence[str],
    rungs: Rungs,
) -> Iterator[Case]:
    """diffusers, then every backend from the bottom up.  A graph lives until the next case is asked for."""
    yield anchor
    spec = stage_spec(anchor.stage, anchor.setting, architecture, Precision.of(dtype))
    for backend in backends:
        for note, without in steps_of(backend, rungs, bench.device):
            subject = anchor.subject.model_copy(
                update={"name": "svd-engine", "backend": backend, "dtype": dtype, "without_rewrites": without}
            )
            case = anchor.model_copy(update={"subject": subject, "note": note})
            if backend != "onnxruntime":
                yield case
                continue
            bench.say(f"{case}: exporting")
            with exported(subject, spec) as with_graph:
                yield case.model_copy(update={"subject": with_graph})


def steps_of(backend: str, rungs: Rungs, device: torch.device) -> list[tuple[str, tuple[str, ...]]]:
    """Note and left-out rewrites of each rung.  Eager without rewrites is diffusers' module itself."""
    if rungs == "ends":
        return [("all rewrites", ())]
    names = tuple(rewrite.name for rewrite in rewrites_for(backend, device.type))
    added = [(f"+ {name}", names[number + 1 :]) for number, name in enumerate(names)]
    return added if backend == "eager" else [("no rewrites", names), *added]


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
        rate = best_rate(ceiling, first.dtype)
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
