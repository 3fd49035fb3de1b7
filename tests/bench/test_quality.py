"""The command and its arithmetic, on made-up figures; the demo checkpoint is held to them in test_demo."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from svd_bench.cli import main
from svd_bench.compiled.ladder import BARE
from svd_bench.quality import evaluate as quality
from svd_bench.quality import half as halves
from svd_bench.quality import held_out
from svd_bench.quality import reuse as reusing
from svd_bench.quality import samplers as sampling
from svd_bench.quality.document import (
    BUCKETS,
    Difference,
    HalfDocument,
    Metric,
    Motion,
    QualityDocument,
    ReuseDocument,
    Sampled,
    SamplersDocument,
    half_table,
    quality_tables,
    reuse_table,
    samplers_tables,
)
from svd_bench.quality.evaluate import Videos, of_motions
from svd_bench.quality.samplers import BUDGETS, CHOICES, REFERENCE, Samplers, Shape, most_steps
from svd_bench.report import plots
from svd_engine import Reuse
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.errors import BackendUnavailable
from svd_engine.media.motion import psnr
from svd_engine.networks.rewrites import REWRITES, TENSORRT_REWRITES
from svd_engine.sampling.registry import SAMPLERS, evaluations
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


@pytest.mark.parametrize("text", ["docs/benchmarks.md", CARD])
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


# Samplers

SAMPLERS_DOCUMENT = DOCUMENT.with_name("samplers.json")


def committed() -> SamplersDocument:
    return SamplersDocument.model_validate_json(SAMPLERS_DOCUMENT.read_text())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_most_steps_that_a_budget_allows(sampler: str) -> None:
    for budget in range(1, 52):
        steps = most_steps(sampler, budget)
        taken, more = (evaluations(sampler, [*range(n, -1, -1)]) for n in (steps, steps + 1))
        assert taken <= budget < more


def test_the_texts_show_the_committed_figures_of_samplers() -> None:
    short, whole = samplers_tables(committed())
    page = (ROOT / "docs/samplers.md").read_text()
    assert short.markdown() in page
    assert whole.markdown() in page
    command = committed().environment.command.partition(" --markdown")[0]
    assert command in page


def test_the_sentence_that_says_what_to_choose_follows_from_the_figures() -> None:
    """euler over ays is nearest within every budget, and its 8 evaluations beat 12 of the default."""
    document = committed()
    assert document.budgets == list(BUDGETS)
    of = {name: {row.evaluations: row for row in rows} for name, rows in document.by_name().items()}
    for budget in BUDGETS:
        best = max((row for row in document.rows if row.evaluations <= budget), key=lambda row: row.psnr)
        assert (best.name, best.evaluations) == ("euler, ays", budget)
    assert of["euler, ays"][8].psnr > of["euler, karras"][12].psnr


def test_the_plot_has_a_line_for_each_choice() -> None:
    drawn = plots.samplers(committed())
    for text in (*(", ".join(choice) for choice in CHOICES), "PSNR, dB", "warping error"):
        assert f">{text}<" in drawn
        assert f">{text}<" in (ROOT / "docs/samplers.svg").read_text()


def test_a_row_is_the_mean_over_the_photographs_against_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Grey videos: of the reference 0.5, of other steps 0.5 more by a tenth or a hundredth."""
    asked: list[dict[str, Any]] = []

    def made(self: Videos, name: str, image: object, seed: int = 0, **settings: Any) -> np.ndarray:
        asked.append(settings)
        reference = (settings["sampler"], settings["schedule"], settings["num_inference_steps"]) == REFERENCE
        off = 0.0 if reference else {"near": 0.01, "far": 0.1}[name]
        return np.full((3, 16, 16, 3), 0.5 + off, np.float32)

    monkeypatch.setattr(Videos, "__call__", made)
    engine: Any = type("Engine", (), {"set_progress_bar_config": lambda self, **_: None})()
    photographs: Any = {"near": None, "far": None}
    row = Samplers(engine, photographs, (3, 16, 24)).measured("heun", "ays", 4)
    assert (row.steps, row.evaluations, row.name) == (4, 7, "heun, ays")
    assert row.psnr == pytest.approx((40 + 20) / 2, abs=0.01)
    assert (row.psnr_exact, row.flow, row.warping) == (float("inf"), 0, 0)
    assert {(s["num_frames"], s["height"], s["width"]) for s in asked} == {(3, 16, 24)}


def test_a_shape_left_out_is_the_checkpoint_s() -> None:
    assert Shape(None, 64, None).of(open_checkpoint("demo").model) == (14, 64, 224)


def test_the_command_measures_samplers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any) -> SamplersDocument:
        asked.append(arguments)
        return committed()

    monkeypatch.setattr(sampling, "measure_samplers", measured)
    out, plot = tmp_path / "s.json", tmp_path / "s.svg"
    arguments = ("--samplers", "--frames", 4, "--photographs", 2, "--out", out, "--plot", plot)
    assert call(main, "quality", *arguments) == 0
    ((source, count, shape, *_),) = asked
    assert (source, count, shape) == ("demo", 2, Shape(4, None, None))
    printed = capsys.readouterr().out
    assert "Quality per evaluation: PSNR, dB" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(out.read_text())
    assert SamplersDocument.model_validate_json(out.read_text()) == committed()
    assert plot.read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--plot", "p.svg"), "--plot belongs to --samplers"),
        (("--reuse", "--plot", "p.svg"), "--plot belongs to --samplers"),
        (("--frames", "4"), "belong to --samplers, --reuse and --half"),
        (("--samplers", "--only", "targets"), "pass one of --only, --samplers, --reuse and --half"),
        (("--half", "--reuse"), "pass one of --only, --samplers, --reuse and --half"),
    ],
)
def test_options_of_samplers_that_do_not_belong_together(
    arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, "quality", *arguments) == 2
    assert part in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_rows_come_back_by_name_and_rising() -> None:
    rows = [Sampled("euler", "karras", n, n, 1.0, 1.0, 1.0, 0.0, 0.0) for n in (8, 4)]
    document = committed().model_copy(update={"rows": rows})
    assert [row.steps for row in document.by_name()["euler, karras"]] == [4, 8]


# Reuse

REUSE_DOCUMENT = DOCUMENT.with_name("reuse.json")


def committed_reuse() -> ReuseDocument:
    return ReuseDocument.model_validate_json(REUSE_DOCUMENT.read_text())


def test_the_page_shows_the_committed_figures_of_reuse() -> None:
    page = (ROOT / "docs/reuse.md").read_text()
    assert reuse_table(committed_reuse()).markdown() in page
    assert committed_reuse().environment.command.partition(" --markdown")[0] in page


def test_all_steps_with_reuse_are_the_whole_ones_and_the_shallow_ones() -> None:
    row = committed_reuse().rows[0]
    whole, shallow = row.evaluations - row.shallow, row.shallow
    assert row.share_svd == pytest.approx((whole + shallow * row.shallow_share_svd) / row.evaluations)


def test_the_command_measures_reuse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def measured(*arguments: Any) -> ReuseDocument:
        asked.append(arguments)
        return committed_reuse()

    monkeypatch.setattr(reusing, "measure_reuse", measured)
    out = tmp_path / "r.json"
    assert call(main, "quality", "--reuse", "--frames", 4, "--markdown", "--out", out) == 0
    ((source, shape, *_),) = asked
    assert (source, shape) == ("demo", Shape(4, None, None))
    printed = capsys.readouterr().out
    assert "**Reuse between evaluations**" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(out.read_text())


def test_reuse_is_measured_against_the_whole_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo at its smallest, two steps: where nothing is reused the videos are equal."""
    monkeypatch.setattr(reusing, "SETTINGS", (Reuse(2), Reuse(2, threshold=0)))
    monkeypatch.setattr(reusing, "STEPS", 2)
    monkeypatch.setattr(reusing, "ROUNDS", 2)
    monkeypatch.setattr(reusing, "shallow_share", lambda *_: 0.5)
    document = reusing.measure_reuse("demo", Shape(2, 32, 64), documents.environment(), lambda _: None)
    some, none = document.rows
    assert [(row.shallow, row.evaluations) for row in document.rows] == [(1, 2), (0, 2)]
    assert 30 < some.psnr < none.psnr
    assert (some.time.rounds, some.share_svd, none.share_svd) == (2, 0.75, 1.0)


def test_a_shallow_step_has_fewer_operations_and_more_in_a_higher_branch() -> None:
    demo = open_checkpoint("demo")
    shares = [reusing.shallow_share(demo, (2, 64, 96), branch) for branch in (0, 2, 4)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < 1


# Half precision

HALF_DOCUMENT = DOCUMENT.with_name("half.json")


def committed_half() -> HalfDocument:
    return HalfDocument.model_validate_json(HALF_DOCUMENT.read_text())


def test_the_page_shows_the_committed_figures_of_half_precision() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert half_table(committed_half()).markdown() in page
    assert committed_half().environment.command.partition(" --markdown")[0] in page


def test_no_rewrite_makes_half_precision_worse() -> None:
    """On the demo no rung is 0.05 dB below diffusers' networks, nor 0.2 dB in its worst frame."""
    bare, *rungs = committed_half().rows
    assert (bare.rung, len(rungs)) == (BARE, len(TENSORRT_REWRITES))
    assert min(row.psnr for row in rungs) > bare.psnr - 0.05
    assert min(row.worst_psnr for row in rungs) > bare.worst_psnr - 0.2


def test_a_rung_of_half_precision_has_fewer_rewrites(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey videos: off by a hundredth for each rewrite that is left out."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def opened(checkpoint: object, dtype: str, without: Any, rewrites: object) -> Any:
        asked.append((dtype, tuple(without)))
        places = {"vae/resnet-blend": 1, "unet/split-geglu": 0, "unet/temporal-conv2d": 1}
        off = 0.01 * (1 + len(without)) if dtype == "fp16" else 0
        return nullcontext(SimpleNamespace(source=SimpleNamespace(rewrites=lambda: places), off=off))

    class Grey:
        def __init__(self, engine: Any) -> None:
            self.frames = np.full((3, 32, 64, 3), 0.5 + engine.off, np.float32)

        def __call__(self, *_: object, **settings: Any) -> np.ndarray:
            assert settings == {"num_frames": 3, "height": 32, "width": 64}
            return self.frames

    monkeypatch.setattr(halves, "opened", opened)
    monkeypatch.setattr(halves, "Videos", Grey)
    out = tmp_path / "half.json"
    size = ("--frames", 3, "--height", 32, "--width", 64)
    assert call(main, "quality", "--half", *size, "--out", out) == 0
    made = HalfDocument.model_validate_json(out.read_text())
    every, bare, first = asked[1:]
    assert asked[0] == ("fp32", tuple(rewrite.name for rewrite in REWRITES))
    assert (every[1], bare[1], first[1]) == ((), ("temporal-conv2d", "resnet-blend"), ("resnet-blend",))
    assert [row.rung for row in made.rows] == [BARE, "+ temporal-conv2d", "+ resnet-blend"]
    assert [row.psnr for row in made.rows] == pytest.approx([30.46, 33.98, 40], abs=0.01)
    assert all(row.worst_psnr == pytest.approx(row.psnr) for row in made.rows)
    printed = capsys.readouterr().out
    assert "Half precision, the rewrites added one at a time" in printed
    assert json.loads(printed.splitlines()[-1]) == json.loads(out.read_text())


def test_sums_of_half_precision_are_rounded_once() -> None:
    """As float32 has them of the same numbers; of other types, and of other operators, nothing changes."""
    x, weight = (torch.randn(8, n, generator=torch.manual_seed(n)).half() for n in (512, 512))
    rounded = (x.float() @ weight.float().T).half()
    with halves.SumsInFloat32():
        product, whole, total = x @ weight.T, x.double() @ weight.double().T, x + x
    assert product.dtype == total.dtype == torch.float16
    assert torch.equal(product, rounded)
    assert whole.dtype == torch.float64
    assert torch.equal(total, 2 * x)


def test_an_engine_of_a_bundles_rewrites_on_the_cpu() -> None:
    """The demo in half precision: what torch has no fast kernels for is computed, and stays near float32."""
    demo = open_checkpoint("demo")
    videos = []
    for dtype, mode in (("fp32", nullcontext()), ("fp16", halves.SumsInFloat32())):
        with halves.opened(demo, dtype, (), TENSORRT_REWRITES) as engine, mode:
            image = torch.rand(1, 3, 32, 64, generator=torch.manual_seed(0))
            videos.append(
                Videos(engine)("noise", image, num_frames=2, height=32, width=64, num_inference_steps=1)
            )  # type: ignore[arg-type]
            assert engine.source.rewrites()["unet/attention-layout"] > 0
    assert 40 < psnr(*videos) < 90
