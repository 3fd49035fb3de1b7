"""One Markdown and one HTML page over results: sections by machine, document and setting.

Nothing is put into one table or plot that does not belong into one scope, and nothing unmeasured is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from svd_bench.documents.results import Results
from svd_bench.documents.scopes import by_hardware, scopes
from svd_bench.documents.table import GIB, Table, figure
from svd_bench.report.plots import PLOTS
from svd_bench.report.views import VIEWS
from svd_engine.cli import console
from svd_engine.errors import OutputError, SettingsError

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 72rem; margin: auto; padding: 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding: .3rem 0 }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
.n { text-align: right }
.note, figcaption { color: #555; font-size: 13px }
.wide { overflow-x: auto }
svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Plot:
    title: str
    name: str  # of its file
    svg: str


@dataclass(frozen=True)
class Lines:
    """A list of short remarks."""

    lines: Sequence[str]


Block = Heading | Plot | Lines | Table


def page(documents: Sequence[tuple[str, Results]]) -> list[Block]:
    """`documents` are named, each name once.  Raises SettingsError for none, BackendUnavailable."""
    names = [name for name, _ in documents]
    if not documents or len(set(names)) < len(names):
        raise SettingsError(
            "results",
            expected="at least one document, with file names that differ",
            got=", ".join(names) or "none",
            remedy="Pass JSON files that svd-bench wrote; rename those that share a name.",
        )
    blocks: list[Block] = [Heading("Benchmark report", 1)]
    for group in by_hardware(documents):
        blocks.append(Heading(group[0][1].environment.device, 2))
        for name, document in group:
            blocks += [Heading(name, 3), _environment(document)]
            for number, scope in enumerate(scopes(document)):
                tables = [table for view in VIEWS.values() for table in view(scope)]
                blocks += [Heading(scope.title, 4), *tables] if tables else []
                for title, plot in PLOTS.items():
                    if svg := plot(scope):
                        blocks.append(Plot(title, f"{name}-{number}-{title.lower().replace(' ', '-')}", svg))
            if document.outcomes:
                rows = [[o.stage, o.status, o.why or "-", f"{o.seconds:.1f} s"] for o in document.outcomes]
                blocks.append(Table(f"Checks of {name}", ["stage", "", "why", "time"], rows, left=3))
            if document.warnings:
                blocks += [Heading(f"Warnings of {name}", 4), Lines(document.warnings)]
    return blocks


def markdown(blocks: Sequence[Block]) -> str:
    """Plots are linked: `write` puts them into plots/."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"{'#' * level} {text}")
            case Plot(title, name, _):
                parts.append(f"![{title}](plots/{name}.svg)")
            case Lines(lines):
                parts.append("\n".join(f"- {line}" for line in lines))
            case Table():
                parts.append(block.markdown().rstrip())
    return "\n\n".join(parts) + "\n"


def html(blocks: Sequence[Block]) -> str:
    """One file that needs no other: plots are inside, no scripts, no fonts."""
    parts = []
    for block in blocks:
        match block:
            case Heading(text, level):
                parts.append(f"<h{level}>{escape(text)}</h{level}>")
            case Plot(title, _, svg):
                parts.append(f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>")
            case Lines(lines):
                parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>")
            case Table():
                parts.append(f"<div class=wide>{block.html()}</div>")
    head = f"<meta charset=utf-8><title>Benchmark report</title><style>{STYLE}</style>"
    return (
        f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def write(blocks: Sequence[Block], folder: Path) -> None:
    """report.md, report.html and plots/*.svg; files of these names are replaced.  Raises OutputError."""
    files = {folder / "plots" / f"{b.name}.svg": b.svg for b in blocks if isinstance(b, Plot)}
    files |= {folder / "report.md": markdown(blocks), folder / "report.html": html(blocks)}
    try:
        for parent in {path.parent for path in files}:
            parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"folder {folder}",
            expected="a folder that can be made",
            got=str(error),
            remedy="Choose another path.",
        ) from error
    for path, text in files.items():
        console.write_text(path, text)


def _environment(document: Results) -> Lines:
    e = document.environment
    gpu = [f"{e.device_memory / GIB:.0f} GiB, driver {e.driver}, CUDA {e.cuda}"] if e.device_memory else []
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items())
    lines = [
        *(
            ["rehearsal without a GPU, on tiny networks: no figure says anything of one"]
            if document.rehearsal
            else []
        ),
        *gpu,
        f"{e.cpu}, {e.cores} cores, {e.threads} threads, {e.host_memory / GIB:.0f} GiB",
        f"commit {e.commit}, measured {e.measured_at}",
        versions,
        f"command: {e.command}",
    ]
    if ceiling := document.ceiling:
        rates = [f"matmul {t} {figure(r / 1e12)} TFLOP/s" for t, r in ceiling.matmul_flops.items()]
        rates += [f"convolution {t} {figure(r / 1e12)} TFLOP/s" for t, r in ceiling.conv_flops.items()]
        lines.append(f"ceiling: {', '.join(rates)}, copy {figure(ceiling.copy_bytes / 1e9)} GB/s")
    if any(row.setting.random_weights for row in document.rows):
        lines.append("random weights: work, speed and memory are the real ones, the videos mean nothing")
    return Lines(lines)
