"""What `svd-bench tiers` prints: the cards by tier, predictions for them, and how far to trust those."""

from __future__ import annotations

from svd_bench.cards import predict
from svd_bench.cards.cards import CARDS
from svd_bench.cards.work import FRAMES
from svd_bench.documents.table import Table, percent


def overview(efficiency: predict.Efficiency, steps: int = 25) -> str:
    """The tiers, the efficiency behind the predictions, and the model against published times."""
    return "\n\n".join([_cards(efficiency, steps), _efficiency(efficiency), _checks()])


def _cards(efficiency: predict.Efficiency, steps: int) -> str:
    predicted = predict.predictions(efficiency, steps)
    sources = list(dict.fromkeys(card.source for card in CARDS))
    rows = []
    for card in sorted(CARDS, key=lambda card: (card.tier.gigabytes, card.memory, card.flops)):
        seconds = [f"{p.seconds:.1f}" for p in predicted.get(card.name, [])] or ["measured"] * len(FRAMES)
        rows.append(
            [
                f"{card.tier.name} GB", card.name + "*" * bool(card.low_power), f"{card.memory} GB",
                card.compute_capability,
                f"{card.bandwidth / 1e9:.0f}", f"{card.flops / 1e12:.1f}", *seconds,
                f"[{sources.index(card.source) + 1}]",
            ]
        )  # fmt: skip
    columns = [f"predicted s, {frames} frames" for frames in FRAMES]
    return Table(
        f"Cards by memory tier, and a video's latency ({steps} steps, 576x1024, guidance) as predicted",
        ["tier", "card", "memory", "capability", "GB/s", "TFLOP/s", *columns, "source"],
        rows,
        left=2,
        note=f"{_trust(efficiency)}\n"
        "TFLOP/s: dense fp16 with fp32 accumulation.  A card counts in the largest tier that its memory "
        "fills.\nA prediction says nothing about whether the video fits: that is `svd-bench tiers --run`.\n"
        + _numbered(sources),
    ).text()


def _trust(efficiency: predict.Efficiency) -> str:
    """Whose efficiency it is, which cards will be slower and why, and how far off the model has been."""
    whose = f"Efficiency of the predictions, taken to hold on every card: {efficiency.source}"
    if not efficiency.measured:
        whose += ".\nIt is another engine's: --measured takes svd-engine's own, from results on a GPU"
    low = ", ".join(f"{card.name} {card.low_power} W" for card in CARDS if card.low_power)
    others = [check for check in predict.validations() if check.error is not None]
    worst = max(others, key=lambda check: abs(check.error or 0))
    return (
        f"{whose}.\n"
        f"* Low-power boards ({low}) will be slower than predicted: TFLOP/s are those of the boost clock,\n"
        "which such a board cannot hold under this work, and the model knows no power limit.\n"
        f"Against {len(others)} published times the model is off by up to {percent(abs(worst.error or 0))} "
        f"({worst.row.stack} on {worst.row.card}: {worst.row.seconds:.1f} s published, "
        f"{worst.predicted:.1f} s predicted); below, all of them."
    )


def _efficiency(efficiency: predict.Efficiency) -> str:
    stages = ", ".join(f"{stage} {percent(share)}" for stage, share in efficiency.stages.items())
    return f"Efficiency behind the predictions, of {efficiency.card}: {stages}"


def _checks() -> str:
    validations = predict.validations()
    sources = list(dict.fromkeys(check.row.source for check in validations))
    rows = [
        [
            check.row.stack, check.row.card, check.row.accumulation, f"{check.row.seconds:.1f}",
            "fitted" if check.predicted is None else f"{check.predicted:.1f}",
            percent(check.error, signed=True), f"[{sources.index(check.row.source) + 1}]",
        ]
        for check in validations
    ]  # fmt: skip
    return Table(
        "The model against published times of SVD-XT (25 frames, 25 steps)",
        ["stack", "card", "accumulates in", "published s", "predicted s", "error", "source"],
        rows,
        left=3,
        note="Each kind of stack is fitted to its time on the A100 80GB SXM, and has no error there.\n"
        + _numbered(sources),
    ).text()


def _numbered(sources: list[str]) -> str:
    return "\n".join(f"[{i}] {source}" for i, source in enumerate(sources, 1))
