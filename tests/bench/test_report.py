"""The report: what stands in which table, and what never stands together."""

from __future__ import annotations

import pytest

from svd_bench.documents.results import Outcome, Ratio, Results, Row, Spread
from svd_bench.documents.scopes import scopes
from svd_bench.documents.table import Table, figure, gibibytes, milliseconds, percent
from svd_bench.report import pages as report
from svd_bench.report import views
from svd_bench.report.pages import Heading, Lines, Plot
from svd_bench.report.plots import PLOTS
from svd_bench.report.views import VIEWS
from svd_engine.errors import SettingsError
from tests.bench import documents
from tests.bench.documents import GIB, environment, ratio, results, row, setting, spread


def tables(document: Results) -> dict[str, Table]:
    return {t.title: t for scope in scopes(document) for view in VIEWS.values() for t in view(scope)}


def figures(document: Results) -> dict[str, str]:
    made = {name: plot(scope) for scope in scopes(document) for name, plot in PLOTS.items()}
    return {name: svg for name, svg in made.items() if svg}


def test_a_run_has_its_tables() -> None:
    found = tables(documents.run())
    assert list(found) == [
        "A whole video", "Ours against peers, float16", "Ours against peers, float32", "Stages",
        "Share of the limit",
    ]  # fmt: skip
    video = found["A whole video"]
    assert list(video.header[:3]) == ["", "dtype", "median"]
    assert list(video.rows[2]) == [
        "svd-engine (compiled)", "float16", "8.60 s", "8.51 s to 8.69 s", "25.80 s", "419",
        "30.00 GiB", "28.00 GiB",
    ]  # fmt: skip


def test_peers_come_first_and_are_what_we_are_held_against() -> None:
    document = documents.run()
    turned = document.model_copy(update={"rows": document.rows[::-1]})
    assert tables(turned)["Ours against peers, float16"].header[1] == "diffusers (eager)"
    table = tables(document)["Ours against peers, float16"]
    assert list(table.header) == ["stage", "diffusers (eager)", "svd-engine (eager)", "svd-engine (compiled)"]
    assert list(table.rows[-1]) == [
        "whole_video", "15.10 s, 1.00x", "12.40 s, 0.82x (0.80 to 0.84)", "8.60 s, 0.57x (0.56 to 0.58)",
    ]  # fmt: skip


def test_every_table_and_page_tells_the_same_ratio() -> None:
    """One ratio, paired, below 1 faster: no table divides medians of its own."""
    theirs = row("vae_decoder", 800, subject="diffusers", backend="eager", of_diffusers=ratio(1))
    ours = row("vae_decoder", 500, of_diffusers=Ratio(median=1.22, low=1.1, high=1.3, rounds=5))
    found = tables(results(theirs, ours))
    assert list(found) == ["Ours against peers, float16", "Stages"]
    for table in found.values():
        cells = [cell for cells in table.rows for cell in cells if "x" in cell]
        assert [cell.rpartition(", ")[2] for cell in cells] == ["1.00x", "1.22x (1.10 to 1.30)"]
        assert views.PAIRED in table.note


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Ratio(median=0.9, low=0.8, high=0.99, rounds=5), "0.90x (0.80 to 0.99)"),
        (Ratio(median=0.9, low=0.8, high=1.01, rounds=5), "0.90x (0.80 to 1.01): no difference seen"),
        (Ratio(median=1.0, low=1.0, high=1.0, rounds=5), "1.00x (1.00 to 1.00): no difference seen"),
        (Ratio(median=1.1, low=1.01, high=1.2, rounds=2), "1.10x (1.01 to 1.20)"),
        (Ratio(median=0.5, low=0.5, high=0.5, rounds=1), "0.50x (one round)"),
        (Ratio(median=0.5), "0.50x"),
        (None, "-"),
    ],
)
def test_a_ratio_says_whether_a_difference_was_seen(given: Ratio | None, said: str) -> None:
    assert views.of_diffusers(row(of_diffusers=given)) == said


def test_a_document_without_rounds_says_that_its_ratio_has_no_spread() -> None:
    old = row("vae_decoder", 500).model_dump() | {"of_diffusers": 0.62}
    document = results(row("vae_decoder", 800, subject="diffusers"), Row.model_validate(old))
    table = tables(document)["Stages"]
    assert "0.62x" in table.rows[1]
    assert views.UNPAIRED in table.note
    assert views.PAIRED not in table.note


@pytest.mark.parametrize(("low", "high", "remarked"), [(152, 800, True), (152, 191, True), (152, 189, False)])
def test_wild_times_of_one_subject_are_remarked_on(low: float, high: float, remarked: bool) -> None:
    wild = row("vae_decoder", latency_ms=Spread(median=170, p10=low, p90=high, runs=5))
    said = f"Remark: vae_decoder, svd-engine (compiled, float16) took from 152 ms to {high} ms (p10 to p90)"
    assert (said in tables(results(wild))["Stages"].note) == remarked


@pytest.mark.parametrize("whole", [8600 * 1.2, 8600 * 0.8])
def test_a_video_that_its_stages_do_not_add_up_to_is_remarked_on(whole: float) -> None:
    """25 steps of 310 ms, a decoder of 800 ms, encoders of 9 and 33 ms, 3.5 ms of sampler: 8.6 s."""
    document = documents.run()
    assert "Remark" not in tables(document)["A whole video"].note
    rows = [
        r.model_copy(update={"latency_ms": spread(whole)})
        if (r.stage, r.backend) == ("whole_video", "compiled")
        else r
        for r in document.rows
    ]
    note = tables(results(*rows))["A whole video"].note
    assert note.count("Remark") == 1
    assert f"whole_video, svd-engine (compiled, float16) took {milliseconds(whole)}, its stages" in note
    assert f"add up to 8.60 s ({whole / 8595.5:.2f}x)" in note
    assert (
        "Remark" not in tables(results(*(r for r in rows if r.stage != "vae_decoder")))["A whole video"].note
    )


def test_dtypes_are_not_held_against_each_other() -> None:
    theirs = row("denoiser_step", 900, subject="diffusers", backend="eager", dtype="float32")
    assert not [title for title in tables(results(theirs, row("denoiser_step", 300))) if "peers" in title]


def test_the_samplers_arithmetic_is_a_stage_but_no_contest() -> None:
    theirs = row("sampler", 13.5, subject="diffusers", backend="torch")
    found = tables(results(theirs, row("sampler", 0.16, backend="torch")))
    assert list(found) == ["Stages"]


def test_the_share_of_the_limit() -> None:
    table = tables(documents.run())["Share of the limit"]
    step = next(list(r) for r in table.rows if r[0] == "denoiser_step" and r[1] == "svd-engine (compiled)")
    assert step[3:] == ["65%", "310 ms", "160", "516"]  # 159.9 TFLOP in 310 ms, of 790 TFLOP/s
    whole = next(list(r) for r in table.rows if r[0] == "whole_video")
    assert whole[5] == "4,174"


def test_a_ladder_is_a_table_for_each_stage() -> None:
    found = tables(documents.ladder())
    assert list(found) == ["Ladder of optimisations: denoiser_step", "Ladder of optimisations: vae_decoder"]
    rung = list(found["Ladder of optimisations: denoiser_step"].rows[1])
    assert rung[0] == "svd-engine (eager), + single_token_cross_attention"
    assert rung[2] == "484 ms"
    assert rung[4] == "0.93x (0.91 to 0.95)"


def test_tiers_show_the_settings_that_differ() -> None:
    (table,) = tables(documents.tiers()).values()
    assert table.title == "What fits by memory tier"
    said = [list(row)[:6] for row in table.rows]
    assert said[0] == ["8 GB", "eager", "single", "swapped", "does not fit (denoiser)", "25"]
    assert said[1] == ["12 GB", "eager", "single", "resident", "fits", "1"]
    assert said[4] == ["40 GB", "eager", "batched", "resident", "fits", "14"]


def test_a_tier_that_nothing_fits_has_its_table() -> None:
    document = results(kind="tiers", misfits=documents.tiers().misfits)
    (table,) = tables(document).values()
    assert len(table.rows) == 1
    assert figures(document) == {}


def test_what_was_not_measured_is_not_shown() -> None:
    """A single stage of ours has no peers, no video, no limit, no energy, no VRAM, and no breakdown."""
    document = results(row("denoiser_step", 300.0))
    (table,) = tables(document).values()
    assert list(table.header) == ["stage", "of", "dtype", "median", "p10 to p90"]
    assert figures(document) == {}


def test_one_run_has_no_interval() -> None:
    document = results(row(latency_ms=spread(900, runs=1)))
    assert list(tables(document)["A whole video"].rows[0])[3] == "one run"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.123456, "0.123 ms"), (12.345, "12.3 ms"), (999.4, "999 ms"), (1234.5, "1.23 s"), (123456.0, "123 s")],
)
def test_milliseconds(value: float, said: str) -> None:
    assert milliseconds(value) == said


def test_figures_of_nothing_and_of_much() -> None:
    assert (milliseconds(None), gibibytes(None), percent(None)) == ("-", "-", "-")
    assert (gibibytes(3 * GIB // 2), percent(-0.0123, signed=True)) == ("1.50 GiB", "-1.2%")
    assert (figure(1234567.8), figure(0.0123), figure(0.0000271)) == ("1,234,568", "0.0123", "0.0000271")
    assert (percent(0.123), percent(0.0123)) == ("12%", "1.2%")


def sections(blocks: list[report.Block]) -> list[tuple[list[str], list[Table | Plot]]]:
    """Tables and figures, with the headings above them."""
    path: list[str] = []
    found: list[tuple[list[str], list[Table | Plot]]] = []
    for block in blocks:
        if isinstance(block, Heading):
            path = [*path[: block.level - 1], block.text]
            found.append((path, []))
        elif isinstance(block, Table | Plot):
            found[-1][1].append(block)
    return found


def words(block: Table | Plot) -> str:
    return block.text() if isinstance(block, Table) else block.svg


def test_machines_and_settings_never_share_a_table_or_plot() -> None:
    """Every latency here occurs once; no table or plot holds two that do not belong together."""
    places = {  # latency: machine and setting
        "111 ms": (environment(), setting()),
        "222 ms": (environment(), setting(frames=14, decode_chunk=14)),
        "333 ms": (environment(device="NVIDIA L4"), setting()),
        "444 ms": (environment(threads=1), setting()),
    }
    named = []
    for number, (ms, (machine, asked)) in enumerate(places.items()):
        rows = [
            row(stage, float(ms.split()[0]), setting=asked, subject=subject, share_of_ceiling=0.5)
            for stage in ("denoiser_step", "vae_decoder", "whole_video")
            for subject in ("svd-engine", "diffusers")
        ]
        named.append((f"n{number}", results(*rows, environment=machine)))
    both = results(*named[0][1].rows, *named[1][1].rows)  # one document with two settings
    blocks = report.page([*named[2:], ("both", both)])
    seen = set()
    for path, inside in sections(blocks):
        for block in inside:
            here = {ms for ms in places if ms in words(block)}
            assert len(here) <= 1, (path, here)
            seen |= here
            assert "444 ms" not in here or "H200" in path[1]
    assert seen == set(places)
    machines = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    assert machines == ["NVIDIA L4", "NVIDIA H200", "NVIDIA H200"]  # 1 thread and 16 are two machines


def test_two_runs_of_one_machine_stay_apart() -> None:
    """Timings compare only within one run."""
    old, new = results(row(ms=111.0)), results(row(ms=222.0))
    blocks = report.page([("old", old), ("new", new)])
    tables = [block.text() for block in blocks if isinstance(block, Table)]
    assert len(tables) == 2
    assert not [text for text in tables if "111 ms" in text and "222 ms" in text]
    assert [b.text for b in blocks if isinstance(b, Heading) and b.level == 2] == ["NVIDIA H200"]


def test_random_weights_warnings_and_checks_are_said() -> None:
    outcome = Outcome(stage="parity", status="failed", seconds=2.0, why="a difference of 1")
    document = results(row(), warnings=("the clock moved",), outcomes=(outcome,))
    text = report.markdown(report.page([("a", document)]))
    assert "(random weights)" in text
    assert "random weights: work, speed and memory are the real ones, the videos mean nothing" in text
    assert "- the clock moved" in text
    assert "| parity | failed | a difference of 1 | 2.0 s |" in text
    trained = results(row(setting=setting(random_weights=False)))
    assert "random weights" not in report.markdown(report.page([("a", trained)]))


def test_a_name_must_be_of_one_document() -> None:
    for named in ([], [("a", documents.run()), ("a", documents.ladder())]):
        with pytest.raises(SettingsError, match=r"results: expected at least one document.*got .*Pass JSON"):
            report.page(named)


def test_a_rehearsal_is_called_one() -> None:
    document = results(row(), kind="gpu-check")
    said = "rehearsal without a GPU, on tiny networks: no figure says anything of one"
    assert said not in report.markdown(report.page([("a", document)]))
    assert f"- {said}" in report.markdown(
        report.page([("a", document.model_copy(update={"rehearsal": True}))])
    )


def test_the_environment_is_told() -> None:
    (lines,) = [block for block in report.page([("run", documents.run())]) if isinstance(block, Lines)][:1]
    assert "140 GiB, driver 570.1, CUDA 12.8" in lines.lines
    assert (
        "ceiling: matmul float16 790 TFLOP/s, convolution float16 600 TFLOP/s, copy 4,300 GB/s" in lines.lines
    )
