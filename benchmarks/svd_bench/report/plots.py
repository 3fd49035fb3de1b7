"""The plots of one scope, as SVG text.  Needs matplotlib; the same rows give the same bytes.

Bars begin at zero and carry their figure; whiskers go from the 10th to the 90th percentile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

from svd_bench.cards.predict import calls
from svd_bench.documents.results import Row
from svd_bench.documents.scopes import CAP, Scope
from svd_bench.documents.table import GIB, percent
from svd_bench.report import views
from svd_engine.errors import BackendUnavailable
from svd_engine.install import install_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from svd_bench.compiled.document import CompiledDocument
    from svd_bench.quality.document import SamplersDocument

OUR_COLOUR, PEER_COLOUR = "#1f77b4", "#9aa0a6"
NETWORK_COLOURS = {  # the networks of a video, in the order in which they run
    "image_encoder": "#c7c7c7",
    "vae_encoder": "#8c8c8c",
    "denoiser_step": "#1f77b4",
    "vae_decoder": "#ff7f0e",
}
BAR = 0.34  # inches of height a bar
WIDTH = 8.0  # inches


def breakdown(scope: Scope) -> str | None:
    """Each subject's networks end to end, each as often as a video calls it."""
    found: dict[str, dict[str, float]] = {}
    one_call = scope.kind == "run" and scope.setting.guidance != "single"  # else a step may be 1 or 2 calls
    for row in scope.rows if one_call else ():
        if row.stage in NETWORK_COLOURS:
            seconds = row.latency_ms.median / 1e3 * calls(row, row.setting.steps)
            found.setdefault(views.label(row), {})[row.stage] = seconds
    found = {name: parts for name, parts in found.items() if parts.keys() == NETWORK_COLOURS.keys()}
    if not found:
        return None
    figure, (axes,) = _figure([len(found)], legend=True)
    longest = max(sum(parts.values()) for parts in found.values())
    for y, parts in enumerate(found.values()):
        start = 0.0
        for part, colour in NETWORK_COLOURS.items():
            length = parts[part]
            axes.barh(y, length, left=start, color=colour, height=0.7)
            if length > 0.08 * longest:
                axes.text(
                    start + length / 2,
                    y,
                    f"{length:.3g}",
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=8,
                )
            start += length
        axes.annotate(f"{start:.3g}", (start, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * longest)
    _names(axes, list(found))
    axes.set_xlabel("seconds: the median of a call times the calls of a video")
    names = [
        f"{part} x {scope.setting.steps}" if part == "denoiser_step" else part for part in NETWORK_COLOURS
    ]
    from matplotlib.patches import Patch

    handles = [Patch(color=colour) for colour in NETWORK_COLOURS.values()]
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False, fontsize=8)
    return _svg(figure)


def peers(scope: Scope) -> str | None:
    """One panel for each stage and dtype that both sides ran."""
    found = views.contested(scope)
    if not found:
        return None
    figure, panels = _figure([len(rows) for rows in found.values()])
    for axes, ((stage, dtype), rows) in zip(panels, found.items(), strict=True):
        _latencies(axes, rows, [views.label(row) for row in rows])
        axes.set_title(f"{stage}, {dtype}: seconds", fontsize=9, loc="left")
    return _svg(figure)


def ladder(scope: Scope) -> str | None:
    found = views.by_stage(scope.rows if scope.kind == "ladder" else ())
    if not found:
        return None
    figure, panels = _figure([len(rows) for rows in found.values()])
    for axes, (stage, rows) in zip(panels, found.items(), strict=True):
        _latencies(axes, rows, [views.rung(row) for row in rows])
        axes.set_title(f"{stage}: seconds", fontsize=9, loc="left")
    return _svg(figure)


def limit(scope: Scope) -> str | None:
    rows = views.limited(scope)
    if not rows:
        return None
    figure, (axes,) = _figure([len(rows)])
    shares = [row.share_of_ceiling or 0.0 for row in rows]
    bars = axes.barh(range(len(rows)), shares, color=[_colour(row) for row in rows], height=0.7)
    axes.bar_label(bars, [percent(share) for share in shares], padding=3, fontsize=8)
    axes.set_xlim(0, max(1.0, 1.1 * max(shares)))
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of the rate that matrix products reached in the same run")
    _names(axes, [f"{row.stage}, {views.label(row)}, {row.dtype}" for row in rows])
    return _svg(figure)


def vram(scope: Scope) -> str | None:
    rows = [row for row in views.capped(scope) if row.peak_torch_bytes is not None]
    if not rows:
        return None
    figure, (axes,) = _figure([len(rows)])
    peaks = [(row.peak_torch_bytes or 0) / GIB for row in rows]
    bars = axes.barh(range(len(rows)), peaks, color=OUR_COLOUR, height=0.7)
    axes.bar_label(bars, [f"{peak:.1f}" for peak in peaks], label_type="center", color="white", fontsize=8)
    for y, row in enumerate(rows):
        cap = float(row.note.removeprefix(CAP).removesuffix(" GB"))
        axes.plot([cap, cap], [y - 0.45, y + 0.45], color="black", linewidth=1.2)
    axes.set_xlabel("peak VRAM (torch), GiB; the black line is the emulated cap")
    _names(axes, [_fitting(row) for row in rows])
    return _svg(figure)


def tier_latency(scope: Scope) -> str | None:
    rows = views.capped(scope)
    if not rows:
        return None
    figure, (axes,) = _figure([len(rows)])
    _latencies(axes, rows, [_fitting(row) for row in rows])
    axes.set_xlabel("seconds a video, on this GPU under an emulated cap")
    return _svg(figure)


def compiled(document: CompiledDocument) -> str:
    """A panel for each network: what its largest kernels read and write."""
    figure, panels = _figure([len(network.names) for network in document.networks])
    for axes, network in zip(panels, document.networks, strict=True):
        groups = network.names.values()
        read, written = ([getattr(g, f"{way}_bytes") / GIB for g in groups] for way in ("read", "written"))
        y = range(len(read))
        axes.barh(y, read, color=OUR_COLOUR, height=0.7, label="read")
        bars = axes.barh(y, written, left=read, color=PEER_COLOUR, height=0.7, label="written")
        totals = [f"{a + b:.3g}" for a, b in zip(read, written, strict=True)]
        axes.bar_label(bars, totals, padding=3, fontsize=8)
        axes.set_xlim(0, 1.15 * max(a + b for a, b in zip(read, written, strict=True)))
        _names(axes, [f"{g.kernels} {name[:40]}" for name, g in network.names.items()])
        axes.set_title(f"{network.network}, {document.target}: GiB a call", fontsize=9, loc="left")
    panels[0].legend(frameon=False, fontsize=8)
    return _svg(figure)


def samplers(document: SamplersDocument) -> str:
    """A panel for each figure over evaluations, a line for each sampler over each schedule."""
    figure, panels = _figure([6] * 4, legend=True)
    figures = {
        "PSNR, dB": "psnr",
        "SSIM": "ssim",
        "flow difference, pixels a frame": "flow",
        "warping error": "warping",
    }
    for axes, (title, name) in zip(panels, figures.items(), strict=True):
        for label, rows in document.by_name().items():
            axes.plot(
                [row.evaluations for row in rows], [getattr(row, name) for row in rows], marker="o",
                markersize=3, linewidth=1, label=label,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(document.budgets, [str(budget) for budget in document.budgets], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].axhline(document.reference.warping, color="black", linewidth=0.8, linestyle=":")
    panels[-1].set_xlabel("evaluations of the denoiser; dotted: the reference's own", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return _svg(figure)


PLOTS: dict[str, Callable[[Scope], str | None]] = {
    "Stage breakdown": breakdown,
    "Ours against peers": peers,
    "Ladder of optimisations": ladder,
    "Share of the limit": limit,
    "VRAM by tier": vram,
    "Latency by tier": tier_latency,
}


def _figure(bars: Sequence[int], legend: bool = False) -> tuple[Figure, list[Axes]]:
    """One panel below the other, each as high as its bars need.  Raises BackendUnavailable."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable(
            "the report's plots",
            expected="matplotlib",
            got=str(error),
            remedy=f"Run: {install_line('bench')}",
        ) from error
    heights = [count * BAR + 0.7 for count in bars]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.4 * legend), layout="constrained")
    panels: Any = figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)
    return figure, list(panels[:, 0])


def _latencies(axes: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    seconds = [row.latency_ms.median / 1e3 for row in rows]
    below = [(row.latency_ms.median - row.latency_ms.p10) / 1e3 for row in rows]
    above = [(row.latency_ms.p90 - row.latency_ms.median) / 1e3 for row in rows]
    y = range(len(rows))
    axes.barh(y, seconds, color=[_colour(row) for row in rows], height=0.7)
    axes.errorbar(seconds, y, xerr=[below, above], fmt="none", ecolor="black", elinewidth=1, capsize=2)
    for at, row in enumerate(rows):
        end = (row.latency_ms.p90 / 1e3, at)
        axes.annotate(views.median(row), end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(row.latency_ms.p90 / 1e3 for row in rows))
    _names(axes, names)


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.label.set_fontsize(8)
    axes.spines[["top", "right"]].set_visible(False)


def _colour(row: Row) -> str:
    return OUR_COLOUR if row.subject == views.OURS else PEER_COLOUR


def _fitting(row: Row) -> str:
    s = row.setting
    return f"{row.note.removeprefix(CAP)}: {row.backend}, {s.guidance}, {s.networks}, chunk {s.decode_chunk}"


def _svg(figure: Figure) -> str:
    import matplotlib

    text = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "svd-bench", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration, so that a page can hold it
