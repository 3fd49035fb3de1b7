"""The tiers' data against the chips' own arithmetic, and the prediction against arithmetic by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from svd_bench.cards import predict
from svd_bench.cards.cards import CARDS, TIERS, Card, card_named
from svd_bench.cards.overview import overview
from svd_bench.cards.predict import CompiledVideo, Efficiency, Kernels, Stage
from svd_bench.cards.published import PUBLISHED
from svd_bench.cli import main
from svd_bench.compiled.document import CompiledDocument, CompiledNetwork, KernelGroup, KernelWork
from svd_bench.compiled.whole_video import DOCUMENTS, committed_videos, whole_video
from svd_bench.documents.results import Row, Setting
from svd_engine.bundle.manifest import CompiledFigures
from svd_engine.errors import SettingsError
from tests.bench.documents import environment, results, row, setting
from tests.support.commands import call
from tests.support.paths import ROOT

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


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("A100 80GB SXM", 19.5), ("T4", 8.1), ("GeForce RTX 2080 Ti", 13.45), ("GeForce RTX 4090", 82.6),
        ("L4", 30.3), ("RTX A6000", 38.7), ("V100 SXM2 16GB", 15.7),
    ],
)  # fmt: skip
def test_the_float32_rate_is_the_data_sheets(name: str, tflops: float) -> None:
    assert card_named(name).float32_flops == pytest.approx(tflops * 1e12, rel=0.01)


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


CARD = Card("X", (), 24, "8.9", bandwidth=100.0, flops=10.0, source="-", half_rate=True)


def video(
    target: str = "sm89", frames: int = 25, model: str = "svd-xt", by_kernel: bool = True
) -> CompiledVideo:
    """A step of 500 TFLOP, a decoder of 5 TB, encoders of both."""
    stages = (
        Stage("encoders", (Kernels(1, 1e9, 1e12), Kernels(1, 1e9, 1e9, float32=True))),
        Stage("denoiser", (Kernels(2, 1e9, 500e12),), each_step=True),
        Stage("vae_decoder", (Kernels(3, 1e12, 1e9),), calls=5.0),
    )
    return CompiledVideo(model, frames, 576, 1024, target, "TensorRT for RTX 1.7", stages, by_kernel)


def of_measured(*rows: Row) -> Efficiency:
    return predict.of_measured(results(*rows), [video()])


def test_a_kernel_takes_the_larger_of_both_and_a_launch() -> None:
    launch = predict.LAUNCH
    assert predict.kernel_seconds(Kernels(1, 300.0, 20.0), CARD) == 3.0 + launch
    assert predict.kernel_seconds(Kernels(4, 300.0, 50.0), CARD) == 5.0 + 4 * launch
    assert predict.kernel_seconds(Kernels(1, 0.0, 50.0), CARD, "fp16") == 2.5 + launch
    assert predict.kernel_seconds(Kernels(1, 0.0, 50.0, float32=True), CARD, "fp16") == 10.0 + launch


def test_sums_of_kernels_are_a_lower_bound_of_them_apart() -> None:
    apart = [Kernels(1, 300.0, 20.0), Kernels(1, 100.0, 50.0)]
    assert sum(predict.kernel_seconds(k, CARD) for k in apart) > predict.kernel_seconds(
        Kernels(2, 400.0, 70.0), CARD
    )


def test_a_prediction_adds_the_parts_up() -> None:
    card, launch = card_named("A10"), predict.LAUNCH
    parts = predict.part_seconds(video(), card, steps=4)
    assert parts["denoiser"] == pytest.approx(4 * (500e12 / 125e12 + 2 * launch))
    assert parts["vae_decoder"] == pytest.approx(5 * (1e12 / 600e9 + 3 * launch))
    assert parts["encoders"] == pytest.approx(1e12 / 125e12 + 1e9 / 600e9 + 2 * launch)
    prediction = predict.predict(card, video(), steps=4)
    assert prediction.seconds == pytest.approx(sum(parts.values()))
    assert not isinstance(prediction, Row)
    halved = Efficiency(dict.fromkeys(parts, 0.5), "H200 SXM", "by hand")
    assert predict.predict(card, video(), halved, 4).seconds == pytest.approx(2 * prediction.seconds)


@pytest.mark.parametrize(
    ("card", "targets", "taken"),
    [
        ("GeForce RTX 4090", ("sm80", "sm89", "sm120"), "sm89"),
        ("H100 SXM", ("sm80", "sm89", "sm120"), "sm80"),  # TensorRT for RTX has no sm90
        ("H100 SXM", ("sm89",), "sm89"),
        ("GeForce RTX 5090", ("sm80", "sm89"), "sm89"),
        ("V100 SXM2 16GB", ("sm86", "sm89"), "sm86"),
    ],
)
def test_which_target_stands_in(card: str, targets: tuple[str, ...], taken: str) -> None:
    assert predict.compiled_for(card_named(card), [video(t) for t in targets]).target == taken


def test_every_published_time_is_checked_and_nothing_is_fitted() -> None:
    checks = predict.checks(committed_videos())
    whole = [check for check in checks if check.part is None]
    assert [check.row for check in whole] == list(PUBLISHED)
    assert all(check.error == check.predicted / check.published - 1 for check in checks)
    assert all(check.error < 0 for check in whole)  # a bound
    parts = {check.part: check for check in checks if check.part}
    assert parts.keys() == {"denoiser", "vae_decoder", "encoders"}
    a100 = next(c for c in whole if c.row.stack == "TensorRT" and c.row.card == "A100 80GB SXM")
    assert sum(c.predicted for c in parts.values()) == pytest.approx(a100.predicted)
    assert predict.checks([video(frames=14)]) == []


def measured_rows(scale: float, chunk: int = 25, **changed: object) -> list[Row]:
    """Rows of an H200 that runs every stage in `scale` times its bound."""
    bound = predict.part_seconds(video(), card_named("NVIDIA H200"), steps=1)
    encoders, decoder, step = (bound[part] * 1e3 * scale for part in ("encoders", "vae_decoder", "denoiser"))
    at: dict[str, Setting] = {"setting": setting(decode_chunk=chunk)}
    return [
        row("image_encoder", encoders * 0.3, **at | changed),
        row("vae_encoder", encoders * 0.7, **at | changed),
        row("denoiser_step", step, **at | changed),
        row("vae_decoder", decoder * chunk / 25, **at | changed),
    ]


@pytest.mark.parametrize("chunk", [25, 10, 5])
def test_measured_efficiency_is_bound_over_time(chunk: int) -> None:
    """A decoder row is one chunk: the video's decode is as many of them as frames need."""
    efficiency = of_measured(*measured_rows(4.0, chunk))
    assert efficiency.parts == pytest.approx({"denoiser": 0.25, "vae_decoder": 0.25, "encoders": 0.25})
    assert efficiency.source == "measured: svd-engine, compiled, float16, 25 frames, on H200 SXM"


def test_the_fastest_backend_counts() -> None:
    rows = [
        *measured_rows(4.0, backend="eager"),
        *measured_rows(2.0),
        *measured_rows(3.0, backend="onnxruntime"),
    ]
    efficiency = of_measured(*rows)
    assert efficiency.parts["denoiser"] == pytest.approx(0.5)
    assert "compiled" in efficiency.source


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "cpu"},
        {"subject": "diffusers"},
        {"note": "emulated cap 12 GB"},
        {"setting": setting(guidance="single")},
        {"setting": setting(height=320)},
        {"setting": setting(frames=14)},
        {"dtype": "float32"},
    ],
)
def test_rows_of_something_else_are_no_efficiency(changed: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"measured results: expected .*denoiser_step.*got 4 rows.*Meas"):
        of_measured(*measured_rows(2.0, **changed))


def test_a_missing_stage_is_no_efficiency() -> None:
    with pytest.raises(SettingsError, match="no complete set"):
        of_measured(*measured_rows(2.0)[1:])


def test_a_card_without_data_is_refused() -> None:
    document = results(*measured_rows(2.0), environment=environment(device="NVIDIA B300"))
    with pytest.raises(SettingsError, match="NVIDIA B300"):
        predict.of_measured(document, [video()])


def shown(*videos: CompiledVideo, efficiency: Efficiency | None = None) -> str:
    return "\n\n".join(table.text() for table in overview(videos, efficiency))


def test_the_overview_calls_a_prediction_a_prediction() -> None:
    text = shown(*committed_videos())
    lines = text.splitlines()
    assert "predicted s: svd-xt, 25 frames of 576x1024" in lines[1]
    assert all(any(card.name in line for line in lines) for card in CARDS)
    assert "Predicted, not measured, from what the compiler made of svd-xt for sm80 by TensorRT" in text
    assert "measured" not in text.replace("not measured", "")


def test_the_overview_says_how_far_to_trust_its_predictions() -> None:
    """What they rest on, which cards will be slower and why, and the errors."""
    text = shown(video())
    assert (
        "A lower bound, but for tensors that stay in a cache: peak rates are not reached, and no eff" in text
    )
    assert "* Low-power boards (T4 70 W, L4 72 W) will be slower than predicted: TFLOP/s are those" in text
    marked = {line.split("GB")[1].split()[0] for line in text.splitlines() if "*  " in line}
    assert marked == {"T4*", "L4*"}
    assert "Against 8 published times of other engines the lower bound is off by -" in text
    assert "two sums of kernels" not in text
    assert "two sums of kernels" in shown(video(by_kernel=False))
    ours = shown(video(), efficiency=of_measured(*measured_rows(2.0)))
    assert "Divided by the efficiency of H200 SXM (denoiser 50%, vae_decoder 50%, encoders 50%)" in ours
    assert "A lower bound" not in ours


def test_a_card_says_whose_kernels_it_takes() -> None:
    lines = shown(video("sm80"), video("sm89"), video("sm89", 14, "svd")).splitlines()
    of = {card.name: next(line for line in lines if f" {card.name} " in line) for card in CARDS[-3:]}
    assert all("sm89, not sm90, sm80, not sm90" in line for line in of.values())
    assert "sm89  " in next(line for line in lines if "GeForce RTX 4090" in line)
    assert "svd, 14 frames" in lines[1]
    assert "svd-xt, 25 frames" in lines[1]


def test_the_card_that_was_measured_is_not_predicted() -> None:
    efficiency = of_measured(*measured_rows(2.0))
    assert "H200 SXM" not in predict.predictions([video()], efficiency)
    assert len(predict.predictions([video()], efficiency)) == len(CARDS) - 1
    line = next(line for line in shown(video(), efficiency=efficiency).splitlines() if " H200 SXM " in line)
    assert line.split()[-2] == "measured"


def network(
    key: str, moved: int = 10, flop: float = 0.0, fused: int = 0, **changed: object
) -> CompiledNetwork:
    """A product, attention (as one kernel if `fused`) and one other kernel, of equal traffic."""
    each = {"kernels": 1, "read_bytes": moved, "written_bytes": 0}
    names = {"_gemm_mha_v2": KernelGroup(**each)} if fused else {}
    generated = KernelGroup(kernels=2, read_bytes=2 * moved, written_bytes=0)
    fields = {
        "network": key, "flop": flop, "attentions": 1, "fused_attentions": fused, "names": names,
        "kinds": {"gemm": KernelGroup(**each), "kgen": generated}, "seconds": 1.0, "peak_host_bytes": 1,
        "figures": CompiledFigures(
            kernels=3, read_bytes=3 * moved, written_bytes=0, activation_bytes=1, weights_bytes=1
        ),
    }  # fmt: skip
    return CompiledNetwork.model_validate(fields | changed)


def document(*keys: str, **changed: object) -> CompiledDocument:
    return CompiledDocument(
        environment=environment(), compiler="TensorRT for RTX 1.7", target="sm89", model="svd",
        random_weights=True, dtype="float16", networks=tuple(network(key, **changed) for key in keys),
    )  # fmt: skip


KEYS = ("image_encoder-b1", "vae_encoder-b1-32x48", "denoiser-b1-f3-32x48-batched", "vae_decoder-t3-32x48")
SINGLE = "denoiser-b1-f3-32x48-single"


def test_a_document_is_a_video() -> None:
    video = whole_video(document(*KEYS, SINGLE, "vae_decoder-t1-32x48", flop=8.0))
    assert video.shape == ("svd", 3, 32, 48)
    assert [(s.part, s.calls, s.each_step) for s in video.stages] == [
        ("encoders", 1, False), ("encoders", 1, False), ("denoiser", 1, True), ("vae_decoder", 1.0, False)
    ]  # fmt: skip
    assert not video.by_kernel
    assert video.stages[2].kernels == (Kernels(1, 10, 8.0), Kernels(2, 20, 0.0))
    assert video.stages[1].kernels[0].float32


def test_one_half_of_guidance_is_called_twice_and_chunks_as_often_as_needed() -> None:
    video = whole_video(document(*KEYS[:2], SINGLE, "vae_decoder-t2-32x48"))
    assert [stage.calls for stage in video.stages] == [1, 1, 2, 1.5]


@pytest.mark.parametrize(
    ("names", "multiply"),
    [({"_gemm_mha_v2": {"kernels": 1, "read_bytes": 10, "written_bytes": 0}}, 2), ({}, 3)],
    ids=["named", "too small for a name"],
)
def test_fused_attention_multiplies(names: object, multiply: int) -> None:
    video = whole_video(document(*KEYS, flop=8.0, fused=1, names=names))
    first, second = video.stages[2].kernels
    assert (first.count, first.bytes) == (multiply, 10 * multiply)
    assert first.count + second.count == 3


def work(flop: int) -> tuple[KernelWork, ...]:
    return (KernelWork(kind="gemm", kernels=2, bytes=7, flop=flop, float32=False),)


def test_kernels_count_one_by_one_where_a_document_has_them() -> None:
    video = whole_video(document(*KEYS, flop=8.0, work=work(4)))
    assert video.by_kernel
    assert all(stage.kernels == (Kernels(2, 14, 8.0),) for stage in video.stages)


def test_operations_that_no_kernel_shows_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"kernels of image_encoder-b1: expected the 8 FLOP .*got 6\."):
        whole_video(document(*KEYS, flop=8.0, work=work(3)))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([*KEYS[:2], KEYS[3]], "a denoiser of batch 1"),
        (KEYS[:3], "all four networks at 32x48"),
        ([*KEYS[:3], "vae_decoder-t3-32x16"], "all four networks at 32x48"),
        (KEYS[1:], "all four networks at 32x48"),
    ],
)
def test_a_part_of_a_bundle_is_no_video(keys: list[str], expected: str) -> None:
    with pytest.raises(
        SettingsError, match=rf"compiled networks: expected {expected}.*Compile a whole bundle"
    ):
        whole_video(document(*keys))


SHOWN = ("GeForce RTX 4060", "GeForce RTX 4080", "GeForce RTX 4090", "H100 SXM")


def test_a_video_without_guidance() -> None:
    """One call of the denoiser of single guidance a step, and no published time to hold it against."""
    video = whole_video(document(*KEYS, SINGLE, flop=8.0), guidance=False)
    assert [stage.calls for stage in video.stages if stage.each_step] == [1]
    assert not video.guidance
    assert predict.checks(committed_videos(guidance=False)) == []
    with pytest.raises(SettingsError, match="expected a denoiser of batch 1, single guidance, got"):
        whole_video(document(*KEYS), guidance=False)


def test_a_few_step_model_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """README's row is what the command says."""
    cells = []
    for options in ((), ("--steps", 4, "--without-guidance")):
        assert call(main, "tiers", "--markdown", *options) == 0
        rows = [[cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines()]
        cells.append([next(row[-3] for row in rows if card in row) for card in SHOWN])
    text = (ROOT / "README.md").read_text()
    assert "| SVD-XT | 25, guided | " + " | ".join(cells[0]) + " |" in text
    assert "| AnimateLCM-SVD-xt | 4, without guidance | " + " | ".join(cells[1]) + " |" in text
    assert call(main, "tiers", "--plans", "--without-guidance") == 2


def test_the_page_has_what_is_predicted_of_sv3d(capsys: pytest.CaptureFixture[str]) -> None:
    document = DOCUMENTS / "sv3d-u-sm89.json"
    assert call(main, "tiers", "--markdown", "--compiled", document, "--steps", 50) == 0
    rows = [[cell.strip() for cell in row.split("|")] for row in capsys.readouterr().out.splitlines()]
    page = " ".join((ROOT / "docs/benchmarks.md").read_text().split())
    for card in ("RTX 4060", "RTX 4080", "RTX 4090"):
        seconds = next(row[-3] for row in rows if f"GeForce {card}" in row)
        assert f"{seconds} s on an {card}" in page


def test_documents_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "compiled.json"
    path.write_text(document(*KEYS).model_dump_json())
    assert call(main, "tiers", "--compiled", path, "--steps", "3", "--markdown") == 0
    out = capsys.readouterr().out
    assert "predicted s: svd, 3 frames of 32x48" in out
    assert "(3 steps, guidance)" in out
    assert "published" not in out
    assert call(main, "tiers", "--run", "--random-weights", "svd", "--compiled", path) == 2
    assert "--compiled, --markdown or" in " ".join(capsys.readouterr().err.split())


def test_the_pages_show_what_the_command_prints() -> None:
    cards, checks = overview(committed_videos())
    assert cards.markdown().strip() in (ROOT / "docs" / "cards.md").read_text()
    assert checks.markdown().strip() in (ROOT / "docs" / "tensorrt.md").read_text()
