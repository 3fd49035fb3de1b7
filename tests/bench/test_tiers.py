"""The tiers' data against the chips' own arithmetic, and the prediction against arithmetic by hand."""

from __future__ import annotations

import pytest

from svd_bench.cards import overview as tiers
from svd_bench.cards import predict
from svd_bench.cards.cards import CARDS, TIERS, Card, card_named
from svd_bench.cards.work import PUBLISHED, Part, Published, Work, video
from svd_bench.documents.results import Row, Setting
from svd_engine.errors import SettingsError
from tests.bench.documents import environment, results, row, setting

# Multiprocessors, boost GHz, and FLOP a clock and multiprocessor of dense fp16 products summed in fp32:
# 64 (Volta, Turing), 256 (A100), 128 (other Ampere, Ada), 512 (Hopper) multiply-adds a tensor core, of which
# there are 8 (Volta, Turing) or 4 on each; half of it on GeForce.
CHIPS = {
    "GeForce RTX 2080 Ti": (68, 1.545, 512),
    "GeForce RTX 3070": (46, 1.725, 512),
    "GeForce RTX 3080": (68, 1.71, 512),
    "GeForce RTX 4060": (24, 2.46, 512),
    "GeForce RTX 3060": (28, 1.777, 512),
    "GeForce RTX 4070": (46, 2.475, 512),
    "T4": (40, 1.59, 1024),
    "V100 SXM2 16GB": (80, 1.53, 1024),
    "GeForce RTX 4060 Ti": (34, 2.535, 512),
    "GeForce RTX 4080": (76, 2.505, 512),
    "GeForce RTX 5080": (84, 2.617, 512),
    "GeForce RTX 3090": (82, 1.695, 512),
    "GeForce RTX 4090": (128, 2.52, 512),
    "GeForce RTX 5090": (170, 2.407, 512),
    "A10": (72, 1.695, 1024),
    "L4": (58, 2.04, 1024),
    "A100 40GB": (108, 1.41, 2048),
    "RTX A6000": (84, 1.8, 1024),
    "L40S": (142, 2.52, 1024),
    "A100 80GB PCIe": (108, 1.41, 2048),
    "A100 80GB SXM": (108, 1.41, 2048),
    "H100 PCIe": (114, 1.62, 4096),
    "H100 SXM": (132, 1.83, 4096),
    "H200 SXM": (132, 1.83, 4096),
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_rate_is_dense_and_sums_in_fp32(card: Card) -> None:
    """A figure with sparsity, or of fp16 accumulation on GeForce, would be off by two."""
    multiprocessors, ghz, flop = CHIPS[card.name]
    assert card.flops == pytest.approx(multiprocessors * ghz * 1e9 * flop, rel=0.02)
    assert card.half_rate == card.name.startswith("GeForce")
    assert card.source


def test_every_tier_has_cards() -> None:
    assert {card.tier for card in CARDS} == set(TIERS)
    assert len({card.name for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("GeForce RTX 3080", "8"),  # 10 GB
        ("GeForce RTX 5090", "24"),  # 32 GB
        ("A100 40GB", "40/48"),
        ("L40S", "40/48"),
        ("H200 SXM", "141"),
    ],
)
def test_a_card_counts_in_the_tier_that_it_fills(name: str, tier: str) -> None:
    assert card_named(name).tier.name == tier


def test_a_card_is_found_by_the_drivers_name() -> None:
    assert card_named("NVIDIA H200").name == "H200 SXM"
    assert card_named("NVIDIA A100-SXM4-80GB").name == "A100 80GB SXM"
    with pytest.raises(SettingsError, match=r"card 'GTX 1080': expected one of .*T4.*got 'GTX 1080'. Add it"):
        card_named("GTX 1080")


def test_ideal_time_is_products_then_traffic() -> None:
    card = Card("X", (), 24, "8.9", bandwidth=100.0, flops=10.0, source="-", half_rate=True)
    assert predict.ideal_seconds(Work(flop=50.0, bytes=300.0), card) == 5.0 + 3.0
    assert predict.ideal_seconds(Work(flop=50.0, bytes=300.0), card, "fp16") == 2.5 + 3.0
    full = Card("Y", (), 24, "8.9", bandwidth=100.0, flops=10.0, source="-")
    assert predict.ideal_seconds(Work(flop=50.0, bytes=300.0), full, "fp16") == 5.0 + 3.0


def test_a_prediction_adds_the_stages_up() -> None:
    card = card_named("A10")
    shares: dict[Part, float] = {"denoiser": 0.5, "vae_decoder": 0.25, "encoders": 0.1}
    efficiency = predict.Efficiency(shares, "H200 SXM", "by hand")
    work = video(14, 4)
    expected = sum(
        (work[stage].flop / 125e12 + work[stage].bytes / 600e9) / share for stage, share in shares.items()
    )
    prediction = predict.predict(card, efficiency, 14, 4)
    assert prediction.seconds == pytest.approx(expected)
    assert not isinstance(prediction, Row)
    assert predict.predict(card, efficiency, 25, 4).seconds > 1.7 * prediction.seconds


def test_the_assumed_efficiency_gives_back_the_published_stages() -> None:
    efficiency = predict.assumed()
    assert efficiency.source.startswith("published: TensorRT on A100 80GB SXM")
    assert predict.predict(card_named("A100 80GB SXM"), efficiency, 25).seconds == pytest.approx(
        27.48988 + 4.54412 + 0.11888
    )


def test_a_total_time_gives_one_efficiency_for_all_stages() -> None:
    row = Published("stack", "fused", "A100 80GB SXM", 25.2, "-")
    efficiency = predict.of_published(row)
    assert len(set(efficiency.stages.values())) == 1
    assert predict.predict(card_named(row.card), efficiency, 25).seconds == pytest.approx(25.2)


def test_published_times_are_checked_on_cards_that_were_not_fitted() -> None:
    validations = predict.validations()
    assert sorted(c.row.source + c.row.card for c in validations) == sorted(
        r.source + r.card for r in PUBLISHED
    )
    for check in validations:
        assert (check.predicted is None) == (check.row.card == "A100 80GB SXM") == (check.error is None)
    tensorrt = next(c for c in validations if c.row.kind == "tensorrt" and c.row.card == "H100 PCIe")
    assert tensorrt.predicted is not None
    assert tensorrt.error == pytest.approx(tensorrt.predicted / 22.645 - 1)
    assert tensorrt.error == pytest.approx(-0.143, abs=0.001)  # what the table is known to say


def measured_rows(scale: float, chunk: int = 25, **changed: object) -> list[Row]:
    """Rows of an H200 that runs every stage at 1/scale of its ideal."""
    card, work = card_named("NVIDIA H200"), video(25, 1)
    encoders = predict.ideal_seconds(work["encoders"], card) * 1e3 * scale
    decoder = predict.ideal_seconds(work["vae_decoder"], card) * 1e3 * scale
    step = predict.ideal_seconds(work["denoiser"], card) * 1e3 * scale
    at: dict[str, Setting] = {"setting": setting(decode_chunk=chunk)}
    return [
        row("image_encoder", encoders * 0.3, **at | changed),
        row("vae_encoder", encoders * 0.7, **at | changed),
        row("denoiser_step", step, **at | changed),
        row("vae_decoder", decoder * chunk / 25, **at | changed),
    ]


@pytest.mark.parametrize("chunk", [25, 10, 5])
def test_measured_efficiency_is_ideal_over_real(chunk: int) -> None:
    """A decoder row is one chunk: the video's decode is as many of them as frames need."""
    efficiency = predict.of_measured(results(*measured_rows(4.0, chunk)))
    assert efficiency.stages == pytest.approx({"denoiser": 0.25, "vae_decoder": 0.25, "encoders": 0.25})
    assert efficiency.source == "measured: svd-engine, compiled, float16, 25 frames, on H200 SXM"


def test_the_fastest_backend_counts() -> None:
    rows = [
        *measured_rows(4.0, backend="eager"),
        *measured_rows(2.0),
        *measured_rows(3.0, backend="onnxruntime"),
    ]
    efficiency = predict.of_measured(results(*rows))
    assert efficiency.stages["denoiser"] == pytest.approx(0.5)
    assert "compiled" in efficiency.source


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cpu"},
        {"subject": "diffusers"},
        {"note": "emulated cap 12 GB"},
        {"setting": setting(guidance="single")},
        {"setting": setting(height=320)},
        {"dtype": "float32"},
    ],
)
def test_rows_of_something_else_are_no_efficiency(changed: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"measured results: expected .*denoiser_step.*got 4 rows.*Meas"):
        predict.of_measured(results(*measured_rows(2.0, **changed)))


def test_a_missing_stage_is_no_efficiency() -> None:
    with pytest.raises(SettingsError, match="no complete set"):
        predict.of_measured(results(*measured_rows(2.0)[1:]))


def test_a_card_without_data_is_refused() -> None:
    document = results(*measured_rows(2.0), environment=environment(device="NVIDIA B300"))
    with pytest.raises(SettingsError, match="NVIDIA B300"):
        predict.of_measured(document)


def test_the_overview_calls_a_prediction_a_prediction() -> None:
    text = tiers.overview(predict.assumed())
    lines = text.splitlines()
    assert "predicted s, 14 frames" in lines[1]
    assert "predicted s, 25 frames" in lines[1]
    assert all(any(card.name in line for line in lines) for card in CARDS)
    assert "published: TensorRT on A100 80GB SXM" in text
    check = next(line for line in lines if line.startswith("TensorRT") and "H100 PCIe" in line)
    assert "22.6" in check
    assert "-14.3%" in check
    assert "measured" not in text.replace("--measured", "")


def test_the_overview_says_how_far_to_trust_its_predictions() -> None:
    """Whose efficiency, which cards will be slower and why, and the largest known error."""
    text = tiers.overview(predict.assumed())
    assert "taken to hold on every card: published: TensorRT on A100 80GB SXM" in text
    assert "It is another engine's: --measured takes svd-engine's own" in text
    assert "* Low-power boards (T4 70 W, L4 72 W) will be slower than predicted: TFLOP/s are those" in text
    marked = {line.split("GB")[1].strip() for line in text.splitlines() if "*  " in line}
    assert marked == {"T4*                   16", "L4*                   24"}
    assert (
        "Against 5 published times the model is off by up to 48% (diffusers, torch 2.1 on GeForce RTX 4080"
        in text
    )
    assert "+48.5%" in text
    ours = tiers.overview(predict.of_measured(results(*measured_rows(2.0))))
    assert "taken to hold on every card: measured: svd-engine, compiled" in ours
    assert "another engine's" not in ours


def test_the_card_that_was_measured_is_not_predicted() -> None:
    efficiency = predict.of_measured(results(*measured_rows(2.0)))
    assert "H200 SXM" not in predict.predictions(efficiency)
    assert len(predict.predictions(efficiency)) == len(CARDS) - 1
    lines = tiers.overview(efficiency).splitlines()
    assert next(line for line in lines if " H200 SXM " in line).split()[-3:-1] == ["measured", "measured"]
    assert predict.predict(card_named("H200 SXM"), efficiency, 25).seconds == pytest.approx(
        2 * sum(predict.ideal_seconds(w, card_named("H200 SXM")) for w in video(25).values())
    )
