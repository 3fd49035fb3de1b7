"""`svd-bench tiers --plans`: the fastest way that fits into each card, of costs that are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from svd_bench import cli
from svd_bench.cards.cards import card_named
from svd_bench.cards.predict import compiled_for, predict
from svd_bench.compiled.costs import DocumentCosts
from svd_bench.compiled.whole_video import committed, committed_videos, whole_video
from svd_bench.memory import plans
from svd_bench.memory.plans import (
    COMMITTED,
    Ways,
    plans_document,
    plans_table,
    read_plans,
    ways_of_committed,
    ways_of_compiled,
)
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import denoiser
from tests.support.commands import call
from tests.support.paths import ROOT

GIB = 2**30


@pytest.fixture(scope="module")
def ways() -> Ways:
    """SVD-XT's, from the committed figures: no network is counted."""
    (document,) = (d for d in committed() if (d.model, d.target) == ("svd-xt", "sm89"))
    model, costs = random_checkpoint("svd-xt").model, DocumentCosts([document])
    return ways_of_compiled(model, "TensorRT for RTX", costs, whole_video(document))


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


CARDS = {8: "GeForce RTX 4060", 24: "GeForce RTX 4090"}


def test_the_table(ways: Ways) -> None:
    document = plans_document([ways], CARDS)
    table = plans_table(document)
    small, large = table.rows
    assert small[:6] == [
        "8 GB", "svd-xt, 25 x 576 x 1024", "TensorRT for RTX", "does not fit", "-",
        "vae_decoder-t25-576x1024 takes most",
    ]  # fmt: skip
    assert small[-3:] == ["-", "-", "GeForce RTX 4060"]
    assert large[:6] == [*("24 GB", *small[1:3]), "resident", "batched", "whole"]
    assert large[-4:] == ["compiled", "1.00x", f"{document.rows[1].seconds:.1f}", "GeForce RTX 4090"]
    assert "Planned and predicted, not measured" in table.note


def test_predicted_seconds_are_those_of_the_cards_table(ways: Ways) -> None:
    """Of what fits as a whole: the lower bound from compiled kernels; slower ways take their share more."""
    card = card_named("GeForce RTX 4090")
    video = compiled_for(card, [video for video in committed_videos() if video.model == "svd-xt"])
    assert ways.seconds(card) == predict(card, video).seconds
    counted = replace(ways, compiled=None)
    assert counted.seconds(card) == ways.fastest.cost / card.flops
    (row,) = plans_document([ways], {48: "GeForce RTX 4090"}).rows
    assert row.ratio == 1
    assert row.seconds == pytest.approx(ways.seconds(card), abs=0.01)


def test_the_page_shows_the_committed_plans() -> None:
    page = (ROOT / "docs/cards.md").read_text()
    assert plans_table(read_plans(COMMITTED)).markdown().strip() in page


def test_the_committed_plans_are_those_of_the_committed_figures() -> None:
    """Of TensorRT; those of torch take minutes to count, which `make longest` does."""
    shown = tuple(row for row in read_plans(COMMITTED).rows if row.source == "compiled")
    assert shown == plans_document(ways_of_committed(random_checkpoint("svd-xt"))).rows


def test_no_document_of_plans(tmp_path: Path) -> None:
    (tmp_path / "plans.json").write_text('{"rows": [1]}')
    for name in ("plans.json", "none.json"):
        with pytest.raises(SettingsError, match=r"expected a document that `svd-bench tiers --plans"):
            read_plans(tmp_path / name)


def test_the_command_writes_the_document(
    tmp_path: Path, ways: Ways, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plans, "ways_of_torch", lambda checkpoint: ways)  # instead of counting
    assert call(cli.main, "tiers", "--plans", "--markdown", "--out", tmp_path) == 0
    written = plans_table(read_plans(tmp_path / "plans.json")).markdown()
    assert written.strip() in capsys.readouterr().out


def test_a_streamed_decoder_fits_into_8_gb() -> None:
    (ways,) = ways_of_committed(random_checkpoint("svd-xt"))
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
    assert "--plans goes with --markdown and --out only" in capsys.readouterr().err
