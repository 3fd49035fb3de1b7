"""A table and its three looks (text, Markdown, HTML), and how figures are written.  Knows no results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from html import escape

GIB = 2**30


@dataclass(frozen=True)
class Table:
    """The first `left` columns hold words; the others hold figures and align right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    note: str = ""  # what a reader must know, below the table

    def text(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        padded = (
            "  ".join(
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *padded, *([self.note] if self.note else [])])

    def markdown(self) -> str:
        marks = ["---" if i < self.left else "---:" for i in range(len(self.header))]
        head, *rows = ([_cell(c) for c in line] for line in (self.header, *self.rows))
        lines = [head, marks, *rows]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def html(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            opened = (f"<{tag}{'' if i < self.left else ' class=n'}>" for i in range(len(cells)))
            return "".join(f"{o}{escape(c)}</{tag}>" for o, c in zip(opened, cells, strict=True))

        head = f"<tr>{line('th', self.header)}</tr>"
        body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in self.rows)
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        title = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{title}\n<thead>{head}</thead>\n<tbody>{body}</tbody></table>{note}"


def milliseconds(value: float | None) -> str:
    """Three significant figures below a second, then one decimal of a millisecond's worth is noise."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value / 1000:.2f} s" if value < 100_000 else f"{value / 1000:.0f} s"
    return f"{value:.3g} ms"


def figure(value: float) -> str:
    """Three significant figures, never with an exponent."""
    return f"{Decimal(f'{value:.3g}'):f}" if value < 1000 else f"{value:,.0f}"


def gibibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / GIB:.2f} GiB"


def percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1%}" if signed else f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def ratio(median: float, low: float | None, high: float | None, differs: bool | None) -> str:
    """`differs`: whether the whole of low to high is on one side of 1; None where that is not known."""
    if low is None or high is None:
        return times(median)
    if differs is None:
        return f"{times(median)} (one round)"
    spread = f"{times(median)} ({low:.2f} to {high:.2f})"
    return spread if differs else f"{spread}: no difference seen"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
