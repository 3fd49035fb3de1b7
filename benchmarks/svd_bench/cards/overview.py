"""What `svd-bench tiers` shows: the cards by tier, predictions for them, and how far to trust those."""

from __future__ import annotations

from collections.abc import Collection

from svd_bench.cards import predict
from svd_bench.cards.cards import CARDS, Card
from svd_bench.documents.table import Table, percent


def overview(
    videos: Collection[predict.CompiledVideo],
    efficiency: predict.Efficiency | None = None,
    steps: int = 25,
) -> list[Table]:
    """The tiers with predictions, and the bound against published times where `videos` have their size."""
    checks = predict.checks(videos)
    return [cards_table(videos, efficiency, steps), *([checks_table(checks)] if checks else [])]


def cards_table(
    videos: Collection[predict.CompiledVideo], efficiency: predict.Efficiency | None, steps: int
) -> Table:
    predicted = predict.predictions(videos, efficiency, steps)
    shapes = predict.shapes(videos)
    sources = list(dict.fromkeys(card.source for card in CARDS))
    rows = []
    for card in sorted(CARDS, key=lambda card: (card.tier.gigabytes, card.memory, card.flops)):
        made = predicted.get(card.name, [])
        rows.append(
            [
                f"{card.tier.name} GB", card.name + "*" * bool(card.low_power), _targets(card, made),
                f"{card.memory} GB", f"{card.bandwidth / 1e9:.0f}", f"{card.flops / 1e12:.1f}",
                *([f"{p.seconds:.1f}" for p in made] or ["measured"] * len(shapes)),
                f"[{sources.index(card.source) + 1}]",
            ]
        )  # fmt: skip
    columns = [
        f"predicted s: {model}, {frames} frames of {height}x{width}"
        for model, frames, height, width in shapes
    ]
    guidance = "guidance" if all(video.guidance for video in videos) else "no guidance"
    return Table(
        f"Cards by memory tier, and a video's latency ({steps} steps, {guidance}), predicted from compiled "
        "kernels",
        ["tier", "card", "compiled for", "memory", "GB/s", "TFLOP/s", *columns, "source"],
        rows,
        left=3,
        note=f"{_trust(videos, efficiency)}\n"
        "TFLOP/s: dense fp16 with fp32 accumulation.  A card counts in the largest tier that its memory "
        "fills.\nA prediction says nothing about whether the video fits: that is `svd-bench tiers --run`.\n"
        + _numbered(sources),
    )


def _targets(card: Card, made: Collection[predict.Prediction]) -> str:
    """Where the kernels are those of another kind of card, it says so."""
    used = dict.fromkeys(prediction.video.target for prediction in made)
    return ", ".join(t if t == card.target else f"{t}, not {card.target}" for t in used)


def _trust(videos: Collection[predict.CompiledVideo], efficiency: predict.Efficiency | None) -> str:
    """What the predictions rest on, which cards will be slower and why, and how far off they have been."""
    compiled = ", ".join(dict.fromkeys(f"{v.model} for {v.target} by {v.compiler}" for v in videos))
    lines = [
        f"Predicted, not measured, from what the compiler made of {compiled}: each",
        "kernel takes the larger of its bytes over GB/s and its operations over TFLOP/s, and a launch of "
        f"{predict.LAUNCH * 1e6:.0f} us (assumed).",
    ]
    if not all(video.by_kernel for video in videos):
        lines.append(
            "Of some networks only two sums of kernels are known, of those that multiply and of the others:\n"
            "their bound is lower still."
        )
    if efficiency is None:
        lines.append(
            "A lower bound, but for tensors that stay in a cache: peak rates are not reached, and "
            "no efficiency is assumed."
        )
    else:
        shares = ", ".join(f"{part} {percent(share)}" for part, share in efficiency.parts.items())
        lines.append(
            f"Divided by the efficiency of {efficiency.card} ({shares}), taken to hold on every card: "
            f"{efficiency.source}."
        )
    lines.append(
        "Compiled for one target, not the card's own: there are no figures of its own.  TensorRT for RTX has "
        "no sm90;\nsm80 stands in for it, or what is nearest below."
    )
    low = ", ".join(f"{card.name} {card.low_power} W" for card in CARDS if card.low_power)
    lines.append(
        f"* Low-power boards ({low}) will be slower than predicted: TFLOP/s are those of the boost clock,\n"
        "which such a board cannot hold under this work, and no power limit is known here."
    )
    whole = [check for check in predict.checks(videos) if check.part is None]
    if whole:
        errors = [check.error for check in whole]
        lines.append(
            f"Against {len(whole)} published times of other engines the lower bound is off by "
            f"{percent(min(errors), signed=True)} to {percent(max(errors), signed=True)}."
        )
    return "\n".join(lines)


def checks_table(checks: Collection[predict.Check]) -> Table:
    sources = list(dict.fromkeys(check.row.source for check in checks))
    rows = [
        [
            check.row.stack, check.row.card, check.part or "whole video", check.video.target,
            check.row.accumulation, f"{check.published:.1f}", f"{check.predicted:.1f}",
            percent(check.error, signed=True), f"[{sources.index(check.row.source) + 1}]",
        ]
        for check in checks
    ]  # fmt: skip
    return Table(
        "The lower bound against published times of SVD-XT (25 frames of 576x1024, 25 steps, guidance)",
        [
            "stack",
            "card",
            "part",
            "compiled for",
            "accumulates in",
            "published s",
            "predicted s",
            "error",
            "source",
        ],
        rows,
        left=5,
        note="Published of other engines, which ran kernels of their own; predicted from ours at the card's "
        "peak rates, nothing fitted.\nOur VAE encoder is float32, which tensor cores do not do: "
        "other engines' encoders may be below the bound.\n" + _numbered(sources),
    )


def _numbered(sources: list[str]) -> str:
    return "\n".join(f"[{i}] {source}" for i, source in enumerate(sources, 1))
