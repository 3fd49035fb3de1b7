"""The report's files: HTML that needs no other file, Markdown, plots; whole or not there."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from svd_bench import cli
from svd_bench.documents.table import Table
from svd_bench.report import pages as report
from svd_bench.report.pages import Heading, Plot
from svd_bench.report.plots import PLOTS
from svd_engine.errors import BackendUnavailable, OutputError
from tests.bench import documents
from tests.bench.documents import results, row
from tests.support.commands import call


class Page(HTMLParser):
    VOID = ("meta", "br", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def blocks() -> list[report.Block]:
    odd = results(row(), warnings=("<script>alert(1)</script> & more",))
    named = {"run": documents.run(), "ladder": documents.ladder(), "tiers": documents.tiers(), "odd": odd}
    return report.page(list(named.items()))


def test_the_html_page_needs_no_other_file(blocks: list[report.Block]) -> None:
    text = report.html(blocks)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert not {"script", "img", "link"} & set(page.tags)
    assert page.tags.count("svg") == sum(isinstance(block, Plot) for block in blocks)
    assert page.tags.count("table") == sum(isinstance(block, Table) for block in blocks)
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


def test_plots_are_svg_with_their_figures(blocks: list[report.Block]) -> None:
    plots = {block.title: block.svg for block in blocks if isinstance(block, Plot)}
    assert set(plots) == set(PLOTS)
    text = {title: " ".join(ET.fromstring(svg).itertext()) for title, svg in plots.items()}
    assert "15.10 s" in text["Ours against peers"]
    assert "denoiser_step x 25" in text["Stage breakdown"]
    assert "7.75" in text["Stage breakdown"]  # 25 steps of 310 ms
    assert "65%" in text["Share of the limit"]
    assert "+ temporal_conv2d" in text["Ladder of optimisations"]
    assert "24 GB: eager, batched, resident, chunk 4" in text["VRAM by tier"]
    assert "21.0" in text["VRAM by tier"]
    assert "8.52 s" in text["Latency by tier"]


def test_the_same_results_give_the_same_bytes(blocks: list[report.Block]) -> None:
    again = report.page([("run", documents.run())])
    first = [block for block in blocks if isinstance(block, Plot) and block.name.startswith("run-")]
    assert first == [block for block in again if isinstance(block, Plot)]


def test_markdown_tables_are_tables() -> None:
    table = Table("T", ["a|b", "n"], [["x|y", "1"]], note="remark")
    assert table.markdown() == "**T**\n\n| a\\|b | n |\n| --- | ---: |\n| x\\|y | 1 |\n\nremark\n"
    assert table.text() == "T\na|b  n\nx|y  1\nremark"


def test_the_command_writes_pages_and_plots(tmp_path: Path) -> None:
    for name, document in {"run": documents.run(), "tiers": documents.tiers()}.items():
        (tmp_path / f"{name}.json").write_text(document.model_dump_json())
    out = tmp_path / "new" / "report"
    assert call(cli.main, "report", tmp_path / "run.json", tmp_path / "tiers.json", "-o", out) == 0
    text = (out / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(linked) == 5
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *linked, "report.md", "report.html",
    }  # fmt: skip
    for path in linked:
        ET.fromstring((out / path).read_text())


def test_a_bad_document_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.json").write_text(documents.run().model_dump_json())
    (tmp_path / "bad.json").write_text('{"format": 2}')
    out = tmp_path / "report"
    assert call(cli.main, "report", tmp_path / "good.json", tmp_path / "bad.json", "-o", out) == 2
    assert "bad.json" in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"folder .*report: expected a folder that can be made.*Choose"):
        report.write([Heading("x", 1)], tmp_path / "file" / "report")


def test_neither_output_nor_readme_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli.main, "report", tmp_path / "a.json") == 2
    assert "--output" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match=r"plots: expected matplotlib.*Run: pip install"):
        report.page([("run", documents.run())])
