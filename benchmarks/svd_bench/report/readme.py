"""Keeps tables in a text equal to results: what stands between two markers is rendered from one document.

<!-- results:NAME -->            begins a part with every table of NAME.json
<!-- results:NAME/VIEW -->       only its videos, peers, stages, ladder, limit or tiers
<!-- /results:NAME -->           ends a part, with the same words as its beginning
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from svd_bench.documents.results import Environment, Results
from svd_bench.documents.scopes import scopes
from svd_bench.report.views import VIEWS
from svd_engine.errors import SettingsError

MARKER = re.compile(r"<!-- (/?)results:([\w.-]+)(?:/(\w+))? -->")


def render(text: str, documents: Mapping[str, Results]) -> str:
    """`text` with every marked part replaced; rendering the result again changes nothing.

    Raises SettingsError for a marker without its other half, its document or anything to show, and for a
    document that no marker shows.
    """
    pieces, shown, at = [], set(), 0
    markers = list(MARKER.finditer(text))
    for begin, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        wanted = begin.group(0).replace("results:", "/results:", 1)
        if begin.group(1) or end is None or end.group(0) != wanted:
            got = (
                end.group(0) if end and not begin.group(1) else "no beginning" if begin.group(1) else "no end"
            )
            raise _refusal(begin.group(0), "<!-- results:NAME --> and then <!-- /results:NAME -->", got)
        name = begin.group(2)
        if name not in documents:
            raise _refusal(
                begin.group(0), f"one of {', '.join(documents) or 'no documents'}", f"{name}.json missing"
            )
        pieces += [text[at : begin.end()], "\n\n", _tables(begin, documents[name]), "\n\n"]
        shown.add(name)
        at = end.start()
    for name in documents:
        if name not in shown:
            raise _refusal(
                f"{name}.json", f"<!-- results:{name} --> and its end in the text", "no marker of it"
            )
    return "".join([*pieces, text[at:]])


def _tables(marker: re.Match[str], document: Results) -> str:
    view = marker.group(3)
    if view is not None and view not in VIEWS:
        raise _refusal(marker.group(0), f"one of {', '.join(VIEWS)} after the /", view)
    parts = []
    for scope in scopes(document):
        tables = [t for name, of in VIEWS.items() if view in (None, name) for t in of(scope)]
        if tables:
            parts += [
                f"{scope.title}; {_where(document.environment)}",
                *(t.markdown().strip() for t in tables),
            ]
    if not parts:
        raise _refusal(marker.group(0), "rows that it can show", "none in the document")
    return "\n\n".join(parts)


def _where(environment: Environment) -> str:
    torch = environment.versions.get("torch", "unknown")
    threads = "" if environment.device_memory else f", {environment.threads} threads"
    commit, dirty, _ = environment.commit.partition("+")  # "+dirty": with changes that no commit holds
    day = environment.measured_at[:10]
    return f"{environment.device}{threads}, torch {torch}, commit {commit[:9]}{dirty and '+dirty'}, {day}"


def _refusal(what: str, expected: str, got: str) -> SettingsError:
    remedy = "Let every document have its two markers, and every marker its document."
    return SettingsError(what, expected=expected, got=got, remedy=remedy)
