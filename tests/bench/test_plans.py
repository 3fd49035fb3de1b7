"""`svd-bench tiers --plans`: the fastest way that fits into each card, of costs that are known."""

from __future__ import annotations

import pytest

from svd_bench import cli
from svd_bench.compiled.costs import DocumentCosts
from svd_bench.compiled.whole_video import committed, committed_streamed
from svd_bench.memory.plans import Ways, plans_table, ways_of_compiled
from svd_engine.checkpoint.configs import vae_levels
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import denoiser
from tests.support.commands import call

GIB = 2**30


@pytest.fixture(scope="module")
def ways() -> Ways:
    """SVD-XT's, from the committed figures: no network is counted."""
    (document,) = (document for document in committed() if document.model == "svd-xt")
    return ways_of_compiled(random_checkpoint("svd-xt").model, "TensorRT for RTX", DocumentCosts([document]))


def test_every_way(ways: Ways) -> None:
    assert {(p.residency.name, p.profile.guidance) for p in ways.plans} == {
        (networks, guidance) for networks in ("resident", "swapped") for guidance in ("batched", "single")
    }
    assert all(p.profile.decode_chunk == 25 and p.slice_frames is None for p in ways.plans)  # exact
    assert {stage.source for p in ways.plans for stage in p.stages} == {"compiled"}


def test_more_memory_is_never_slower(ways: Ways) -> None:
    taken = [ways.within(gib * GIB) for gib in range(1, 40)]
    fitting = [plan for plan in taken if plan is not None]
    assert 0 < len(fitting) < len(taken)
    costs = [plan.cost for plan in fitting]
    assert costs == sorted(costs, reverse=True)
    assert ways.within(ways.smallest.peak_bytes) is not None
    assert ways.within(ways.smallest.peak_bytes - 1) is None


def test_the_table(ways: Ways) -> None:
    table = plans_table([ways], [8, 24])
    small, large = table.rows
    assert small[:6] == [
        "8 GB", "svd-xt, 25 x 576 x 1024", "TensorRT for RTX", "does not fit", "-",
        "vae_decoder-t25-576x1024 takes most",
    ]  # fmt: skip
    assert small[-1] == "-"
    assert large[:6] == [*("24 GB", *small[1:3]), "resident", "batched", "whole"]
    assert large[-2:] == ["compiled", "1.00x"]
    assert "Planned, not measured" in table.note


def test_a_streamed_decoder_fits_into_8_gb() -> None:
    checkpoint = random_checkpoint("svd-xt")
    cost_of = DocumentCosts([*committed(), *committed_streamed()], vae_levels(checkpoint.configs))
    assert cost_of.slices == [4]
    ways = ways_of_compiled(checkpoint.model, "TensorRT for RTX", cost_of, cost_of.slices)
    plan = ways.within(0.9 * 8 * GIB)
    assert plan is not None
    assert (plan.residency.name, plan.profile.guidance, plan.slice_frames) == ("swapped", "single", 4)
    whole = next(p for p in ways.plans if p.slice_frames is None)
    assert plan.stages[-1].peak_bytes < 0.4 * whole.stages[-1].peak_bytes
    assert 5 * GIB < plan.stages[-1].parked_bytes < 6 * GIB


def test_a_network_that_was_not_compiled() -> None:
    spec = denoiser(Profile(25, 64, 64), random_checkpoint("svd-xt").model.architecture, FLOAT32)
    with pytest.raises(SettingsError, match=r"compiled figures of denoiser-b1-f25-64x64-.*svd-bench"):
        DocumentCosts(committed()[:1])(spec)


def test_plans_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli.main, "tiers", "--plans", "--run") == 2
    assert "--plans goes with --markdown only" in capsys.readouterr().err
