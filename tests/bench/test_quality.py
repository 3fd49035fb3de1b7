"""The command and its arithmetic, on made-up figures; the demo checkpoint is held to them in test_demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svd_bench.cli import main
from svd_bench.quality import evaluate as quality
from svd_bench.quality import held_out
from svd_bench.quality.document import BUCKETS, Difference, Metric, Motion, QualityDocument, quality_tables
from svd_bench.quality.evaluate import Videos, of_motions
from svd_engine.errors import BackendUnavailable
from tests.bench import documents
from tests.support.commands import call
from tests.support.paths import ROOT

FIGURES = [
    Metric("sharp", 24.0, 23),
    Metric("jumps", 4.0, 3, "less"),
    Metric("  for information", 1.5),
]
MOTIONS = [
    Motion(name, bucket, flow, 1 + flow)
    for name, flows in (("coffee", (0.25, 0.5, 1.0)), ("clock", (0.75, 1.0, 2.0)))
    for bucket, flow in zip(BUCKETS, flows, strict=True)
]
SETTINGS = [Difference("same", float("inf"), 1.0, 0.0, 2.0), Difference("10 steps", 31.25, 0.9, 0.12, 0.5)]

# svd-bench quality --photographs 5 --markdown --out DOCUMENT
DOCUMENT = ROOT / "benchmarks" / "svd_bench" / "results" / "quality" / "demo.json"
CARD = "engine/svd_engine/assets/demo/README.md"


def written(figures: list[Metric]) -> QualityDocument:
    return QualityDocument(
        environment=documents.environment(),
        checkpoint="demo",
        figures=figures,
        motions=MOTIONS,
        settings=SETTINGS,
    )


def test_a_figure_is_met_on_the_right_side_of_its_bound() -> None:
    assert [f.met for f in FIGURES] == [True, False, None]
    assert Metric("at the bound", 3, 3, "less").met


def test_tables_say_what_is_met() -> None:
    held, moves, beside = (table.text() for table in quality_tables(written(FIGURES)))
    assert [line.split()[-1] for line in held.splitlines()[2:4]] == ["yes", "no"]
    assert "<= 3" in held
    assert [line.split() for line in moves.splitlines()[2:5]] == [
        ["coffee", "0.25", "(1.2)", "0.50", "(1.5)", "1.00", "(2.0)"],
        ["clock", "0.75", "(1.8)", "1.00", "(2.0)", "2.00", "(3.0)"],
        ["mean", "0.50", "0.75", "1.50"],
    ]
    assert "equal" in beside
    assert beside.splitlines()[3].split()[2:] == ["31.2", "0.9000", "0.120", "500", "ms"]


def test_motion_is_judged_by_its_mean_and_by_the_worst_clip() -> None:
    assert [f.value for f in of_motions(MOTIONS)] == [1.5, 2.0, 3.0, 3.0]


def test_the_document_is_strict_json_and_comes_back() -> None:
    text = written(FIGURES).model_dump_json()
    assert [d["psnr"] for d in json.loads(text)["settings"]] == ["Infinity", 31.25]
    assert QualityDocument.model_validate_json(text) == written(FIGURES)


@pytest.mark.parametrize("text", ["README.md", CARD])
def test_the_texts_show_the_committed_figures(text: str) -> None:
    shown = (ROOT / text).read_text()
    for table in quality_tables(QualityDocument.model_validate_json(DOCUMENT.read_text())):
        assert table.markdown() in shown


@pytest.mark.parametrize(("figures", "code"), [(FIGURES[:1], 0), (FIGURES, 1)])
def test_the_command_fails_when_a_figure_does(
    figures: list[Metric],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any) -> tuple[list[Metric], list[Motion], list[Difference]]:
        asked.append(arguments)
        return figures, MOTIONS, []

    monkeypatch.setattr(quality, "evaluate", measured)
    out = tmp_path / "quality.json"
    assert call(main, "quality", "--photographs", 2, "--only", "targets", "--out", out) == code
    ((source, count, _, only, variant),) = asked
    assert (source, count, only, variant) == ("demo", 2, "targets", None)
    printed = capsys.readouterr().out
    assert "Quality on held-out photographs" in printed
    assert "Settings that are not exact" not in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(out.read_text())


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "evaluate", lambda *_: pytest.fail("measured"))
    assert call(main, "quality", "--out", tmp_path / "missing" / "quality.json") != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Make the folder first" in printed.err


def test_videos_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Engine:
        def set_progress_bar_config(self, *, disable: bool) -> None:
            assert disable

        def __call__(self, image: object, **settings: Any) -> Any:
            calls.append(settings)
            return type("Output", (), {"frames": np.zeros((1, 2, 4, 4, 3), np.float32)})()

    videos = Videos(Engine())  # type: ignore[arg-type]
    videos("coffee", None)  # type: ignore[arg-type]
    videos("coffee", None, motion_bucket_id=127)  # type: ignore[arg-type]
    videos("coffee", None, seed=1)  # type: ignore[arg-type]
    assert [call["generator"].initial_seed() for call in calls] == [0, 1]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"package skimage.*not installed.*\[bench\]"):
        held_out.held_out(64, 64)
