"""Tables between markers, and the repository's own pages against its committed results."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import pytest

from svd_bench import cli
from svd_bench.documents.results import read_results
from svd_bench.documents.scopes import scopes
from svd_bench.report import plots
from svd_bench.report.readme import MARKER, render
from svd_engine.errors import SettingsError
from tests.bench import documents
from tests.bench.documents import results, row
from tests.support.commands import call
from tests.support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "svd_bench" / "results"
TEXT = "# Title\n\n<!-- results:run/peers -->\nold\n<!-- /results:run/peers -->\n\nThe end.\n"
RUN = {"run": documents.run()}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shown_in(page: Path) -> list[str]:
    """The documents whose tables a page has, each as often as it has them."""
    return [name for end, name, _ in MARKER.findall(page.read_text()) if not end]


@pytest.mark.parametrize("page", [*filter(shown_in, PAGES)], ids=lambda page: page.name)
def test_a_page_shows_the_committed_results(page: Path) -> None:
    """Render it again with: svd-bench report RESULTS --readme PAGE, RESULTS being those that it shows."""
    text = page.read_text()
    documents = {name: read_results(RESULTS / f"{name}.json") for name in shown_in(page)}
    assert render(text, documents) == text


def test_every_result_is_shown_once() -> None:
    assert sorted(chain.from_iterable(map(shown_in, PAGES))) == sorted(
        path.stem for path in RESULTS.glob("*.json")
    )


@pytest.mark.parametrize("name", ["cpu-unet-fp32", "cpu-vae-decoder-fp32"])
def test_the_plots_are_of_the_committed_results(name: str) -> None:
    (scope,) = scopes(read_results(RESULTS / f"{name}.json"))
    drawn, shown = plots.ladder(scope), (ROOT / "docs" / "plots" / f"{name}.svg").read_text()
    texts = re.findall(r"<text[^>]*>([^<]+)<", drawn or "")
    assert len(texts) > 8
    assert texts == re.findall(r"<text[^>]*>([^<]+)<", shown)


def test_a_marked_part_is_replaced_and_the_rest_stays() -> None:
    text = render(TEXT, RUN)
    assert text.startswith("# Title\n\n<!-- results:run/peers -->\n\nsvd-xt, 25 frames")
    assert text.endswith("\n\n<!-- /results:run/peers -->\n\nThe end.\n")
    assert "old" not in text
    assert "| whole_video | 15.10 s, 1.00x | 12.40 s, 0.82x (0.80 to 0.84) |" in text
    assert "(random weights); NVIDIA H200, torch 2.13.0, commit 012345678, 2026-01-02" in text
    assert "**Stages**" not in text
    assert render(text, RUN) == text


def test_a_name_alone_shows_every_table() -> None:
    text = render(TEXT.replace("run/peers", "run"), RUN)
    assert all(title in text for title in ("**A whole video**", "**Stages**", "**Share of the limit**"))


def test_one_document_may_be_shown_twice() -> None:
    text = TEXT + TEXT.replace("peers", "limit")
    assert render(text, RUN).count("<!-- results:run/") == 2


def test_other_figures_are_noticed() -> None:
    text = render(TEXT, RUN)
    assert render(text.replace("15.10 s", "14.10 s"), RUN) == text


def test_a_text_without_markers_needs_no_documents() -> None:
    assert render("plain\n", {}) == "plain\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plain", "run.json: expected <!-- results:run --> and its end in the text, got no marker of it"),
        (TEXT.replace("run", "other"), "one of run, got other.json missing"),
        (TEXT.replace("<!-- /results:run/peers -->", ""), "expected .* got no end"),
        (TEXT.replace("<!-- results:run/peers -->", ""), "expected .* got no beginning"),
        (TEXT.replace("/results:run/peers", "/results:run"), "expected .* got <!-- /results:run -->"),
        (TEXT.replace("<!-- /results:run/peers -->", "") + TEXT, "got <!-- results:run/peers -->"),
        (TEXT.replace("peers", "nothing"), "expected one of videos, .* after the /, got nothing"),
        (TEXT.replace("peers", "tiers"), "expected rows that it can show, got none"),
    ],
)
def test_what_does_not_fit_together_is_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        render(text, RUN)
    assert "Let every document have its two markers" in str(refused.value)


def test_a_cpu_says_its_threads() -> None:
    cpu = documents.environment(device="Some CPU", device_memory=None, threads=2)
    text = render(TEXT.replace("/peers", ""), {"run": results(row(), environment=cpu)})
    assert "Some CPU, 2 threads, torch" in text


def test_changes_that_no_commit_holds_are_said() -> None:
    dirty = documents.environment(commit="0123456789abcdef+dirty")
    text = render(TEXT.replace("/peers", ""), {"run": results(row(), environment=dirty)})
    assert "commit 012345678+dirty, 2026" in text


def test_the_command_renders_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, document = tmp_path / "README.md", tmp_path / "run.json"
    readme.write_text(TEXT)
    document.write_text(documents.run().model_dump_json())
    assert call(cli.main, "report", document, "--readme", readme) == 0
    assert readme.read_text() == render(TEXT, RUN)
    assert call(cli.main, "report", document, "--readme", tmp_path / "missing.md") == 2
    assert "--readme" in capsys.readouterr().err


def test_a_refused_text_stays_as_it_was(tmp_path: Path) -> None:
    readme, document = tmp_path / "README.md", tmp_path / "other.json"
    readme.write_text(TEXT)
    document.write_text(documents.run().model_dump_json())
    assert call(cli.main, "report", document, "--readme", readme) == 2
    assert readme.read_text() == TEXT


@pytest.mark.parametrize(
    ("name", "model"),
    [("cpu-unet-fp32-avx2", "SVD-XT"), ("cpu-unet-without-guidance-fp32", "AnimateLCM-SVD-xt")],
)
def test_the_readme_has_the_ratio_on_a_cpu(name: str, model: str) -> None:
    """In the last column of its table of models."""
    rows = read_results(RESULTS / f"{name}.json").rows
    ratio = next(row.of_diffusers for row in rows if row.backend == "onnxruntime")
    assert ratio is not None
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"| {model} |" in line)
    assert line.endswith(f" | {ratio.median:.2f}x |")
