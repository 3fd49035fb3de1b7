"""The rungs and their table, on the smallest networks."""

from __future__ import annotations

from pathlib import Path

import torch

from svd_bench.contest.contest import Bench
from svd_bench.contest.ladder import measure_ladder, steps_of
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import Ratio
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.timing import timer_for
from svd_bench.report.ladder import ladder_tables
from svd_bench.subjects.cases import Case, checkpoint_of
from svd_bench.subjects.one_graph import exported_graph
from svd_bench.subjects.opening import open_case, stage_spec
from svd_engine.networks.rewrites import REWRITES, rewrites_for
from svd_engine.spec.precision import FLOAT32
from tests.bench import documents
from tests.bench.fakes import CEILING, subject
from tests.bench.test_stages import TINY

CPU = torch.device("cpu")


def bench() -> Bench:
    recorder = Recorder("ladder", documents.environment())
    recorder.ceiling = CEILING
    return Bench(CPU, timer_for(CPU), recorder, CEILING, open_case, lambda _: Peaks(host=2**30), repeat=1)


EVERY, WITH_ONNX_RUNTIME = (
    tuple(rewrite.name for rewrite in rewrites_for(backend, "cpu")) for backend in ("eager", "onnxruntime")
)
PORTABLE = tuple(rewrite.name for rewrite in REWRITES)


def test_every_rung_adds_one_rewrite() -> None:
    """Eager torch and ONNX Runtime on a CPU have rungs of their own at the top."""
    for backend, device, names in (("eager", "cpu", EVERY), ("eager", "cuda", PORTABLE)):
        rungs = steps_of(backend, "all", torch.device(device))
        assert [note for note, _ in rungs] == [f"+ {name}" for name in names]
        assert [without for _, without in rungs] == [names[n + 1 :] for n in range(len(names))]
    first, *rungs = steps_of("onnxruntime", "all", CPU)
    assert first == ("no rewrites", WITH_ONNX_RUNTIME)
    assert [note for note, _ in rungs] == [f"+ {name}" for name in WITH_ONNX_RUNTIME]
    assert rungs[-1][1] == ()
    assert steps_of("compiled", "all", CPU)[1:] == steps_of("eager", "all", torch.device("cuda"))
    assert steps_of("eager", "ends", CPU) == [("all rewrites", ())]


def test_the_ladder_of_the_smallest_decoder(tiny_checkpoint: Path) -> None:
    here = bench()
    peer = subject("diffusers").model_copy(update={"checkpoint": str(tiny_checkpoint)})
    measure_ladder(here, peer, peer.dtype, TINY, ["vae_decoder"], ["eager"], "all")
    results = here.recorder.results()
    first, *rungs = results.rows
    assert (first.subject, first.note, first.rewrites) == ("diffusers", "", ())
    assert first.of_diffusers == Ratio(median=1.0)
    assert [len(row.rewrites) for row in rungs] == list(range(1, len(rungs) + 1))
    assert [row.note for row in rungs] == [f"+ {row.rewrites[-1]}" for row in rungs]
    assert all((row.max_abs_difference or 0) < 1e-4 for row in rungs)
    left_out = set(EVERY) - set(rungs[-1].rewrites)
    assert {w.split("'")[1] for w in results.warnings} == {f"+ {name}" for name in left_out}
    [table] = ladder_tables(results)
    assert table.title == "vae_decoder, tiny, 2 frames, 32x48, cpu"
    assert [row[0] for row in table.rows] == ["as published", *(row.note for row in rungs)]
    assert table.rows[0][4] == "1.00x"
    assert {row[-1] for row in table.rows} == {"1.00 GiB"}
    assert "at 0.004 TFLOP/s" in table.note


def test_onnxruntime_runs_a_graph_of_the_rung_and_nothing_stays(tiny_checkpoint: Path) -> None:
    here = bench()
    peer = subject("diffusers").model_copy(update={"checkpoint": str(tiny_checkpoint)})
    measure_ladder(here, peer, peer.dtype, TINY, ["unet"], ["onnxruntime"], "ends")
    theirs, ours = here.recorder.results().rows
    assert (theirs.backend, ours.backend, ours.note) == ("eager", "onnxruntime", "all rewrites")
    assert "single-token-cross-attention" in ours.rewrites
    assert 0 < (ours.max_abs_difference or 0) < 1e-4


def test_bfloat16_is_held_against_float32(tiny_checkpoint: Path) -> None:
    here = bench()
    peer = subject("diffusers", dtype="bfloat16").model_copy(update={"checkpoint": str(tiny_checkpoint)})
    measure_ladder(here, peer, peer.dtype, TINY, ["vae_decoder"], ["eager"], "ends")
    assert all(1e-4 < (row.max_abs_difference or 0) < 0.1 for row in here.recorder.results().rows)


def test_ours_may_compute_in_another_type(tiny_checkpoint: Path) -> None:
    here = bench()
    peer = subject("diffusers").model_copy(update={"checkpoint": str(tiny_checkpoint)})
    measure_ladder(here, peer, "bfloat16", TINY, ["vae_decoder"], ["eager"], "ends")
    theirs, ours = here.recorder.results().rows
    assert (theirs.dtype, ours.dtype) == ("float32", "bfloat16")
    assert theirs.max_abs_difference == 0
    assert 1e-4 < (ours.max_abs_difference or 0) < 0.1


def test_the_folder_of_a_graph_goes_with_its_block(tiny_checkpoint: Path) -> None:
    one = subject(backend="onnxruntime").model_copy(update={"checkpoint": str(tiny_checkpoint)})
    spec = stage_spec("vae_decoder", TINY, checkpoint_of(str(tiny_checkpoint)).model.architecture, FLOAT32)
    with exported_graph(one, spec) as ready:
        assert ready.graph is not None
        folder = Path(ready.graph)
        assert (folder / f"{spec.key}.onnx").is_file()
        running = open_case(Case(subject=ready, stage="vae_decoder", setting=TINY))
        assert running().shape == spec.outputs[0].shape
        running.close()
    assert not folder.exists()
