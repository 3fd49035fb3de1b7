"""The documentation site: built without a warning, every option and public name, nothing from other hosts."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import svd_engine
from tests.support.paths import ROOT
from tests.test_remedies import COMMANDS, command, options

# what a browser fetches by itself, by element: links that a reader follows are not among them
FETCHED = {"src", "srcset", "poster", "data", "background"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it: a link or anchor that leads nowhere, or a page without a place, fails it."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """What a page fetches, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in FETCHED]
        self.fetched += [value or "" for name, value in attrs if (tag, name) == ("link", "href")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}


def test_every_page_of_the_repository_is_in_it(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / f"{page.stem}.html").is_file()
    assert (site / "index.html").is_file()


def test_nothing_is_fetched_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = Page(page.read_text()).fetched
        assert fetched  # the theme's own style and script
        assert [url for url in fetched if re.match(r"(\w+:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(\w+:)?//|@import", style.read_text()), style


def test_what_a_page_fetches_is_there(site: Path) -> None:
    """Pictures in raw HTML too, which mkdocs does not look at."""
    for page in site.rglob("*.html"):
        for url in Page(page.read_text()).fetched:
            path = url.partition("?")[0].partition("#")[0]
            if path and not path.startswith("data:") and page.name != "404.html":
                assert (page.parent / path).exists(), f"{page}: {url}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option(site: Path, name: str) -> None:
    text = (site / "docs/reference" / f"{name}.html").read_text()
    words = set(re.split(r"[\s,|]+", html.unescape(re.sub(r"<[^>]+>", " ", text))))
    ids = Page(text).ids
    for sub, one in command(name).commands.items():
        assert f"{name}-{sub}" in ids
        listed = {option for option in options(one) if option.startswith("-")}
        assert listed <= words, listed - words


def test_the_reference_has_every_public_name(site: Path) -> None:
    ids = Page((site / "docs/reference/python.html").read_text()).ids
    errors = vars(svd_engine.errors)
    for name in set(svd_engine.__all__) - {"__version__"}:
        assert f"svd_engine.{'errors.' * (name in errors)}{name}" in ids
    assert {"svd_engine.VideoEngine.from_bundle", "svd_engine.VideoEngine.__call__"} <= ids
    assert {"svd_engine.serving.jobs.JobService.submit", "svd_engine.observer.Observer.on_step"} <= ids
