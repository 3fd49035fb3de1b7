"""The limit: work as others have counted it, rates on a clock that the test moves."""

from __future__ import annotations

import pytest
import torch

from svd_bench.measuring import ceiling
from svd_bench.measuring.ceiling import measure_ceiling
from svd_bench.subjects import flop as work
from svd_bench.subjects.flop import network_flop, stage_flop
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.checkpoint.random_weights import svd_configs
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from tests.bench import documents
from tests.bench.fakes import CEILING, FakeClock


@pytest.mark.parametrize(
    ("frames", "tflop"),
    [
        (14, {"image_encoder": 0.33, "vae_encoder": 2.6, "denoiser": 44.8, "vae_decoder": 6.94 * 14}),
        (25, {"image_encoder": 0.33, "vae_encoder": 2.6, "denoiser": 79.9, "vae_decoder": 6.94 * 25}),
    ],
)
def test_svd_at_576x1024(frames: int, tflop: dict[str, float]) -> None:
    """Of one batch row, so with guidance "single"."""
    profile = Profile(frames, 576, 1024, guidance="single", decode_chunk=frames)
    counted = {
        spec.network: network_flop(spec, svd_configs(frames)) / 1e12
        for spec in specs_of(profile, Architecture(), FLOAT32)
    }
    assert counted == pytest.approx(tflop, rel=0.015)


def test_a_whole_video_is_the_sum_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"image_encoder": 1, "vae_encoder": 10, "denoiser": 100}

    def flop(spec: object, configs: object) -> float:
        name = spec.network  # type: ignore[attr-defined]
        return costs.get(name, 1000 * spec.inputs[0].shape[0])  # type: ignore[attr-defined]  # frames of a chunk

    monkeypatch.setattr(work, "network_flop", flop)
    setting = documents.setting(frames=5, decode_chunk=2, steps=4)
    assert stage_flop("whole_video", setting, Architecture(), {}) == 11 + 4 * 100 + 5 * 1000
    single = setting.model_copy(update={"guidance": "single"})
    assert stage_flop("whole_video", single, Architecture(), {}) == 11 + 8 * 100 + 5 * 1000
    assert stage_flop("vae_decoder", setting, Architecture(), {}) == 2000
    assert stage_flop("sampler", setting, Architecture(), {}) is None


def test_guidance_in_a_batch_is_twice_the_work() -> None:
    small = random_checkpoint("small")
    single, batched = (
        network_flop(
            specs_of(Profile(14, 64, 64, guidance=g), small.model.architecture, FLOAT32)[2], small.configs
        )
        for g in ("single", "batched")
    )
    assert batched == 2 * single


def test_the_better_rate_is_the_limit() -> None:
    assert CEILING.best_rate("float32") == 4e9
    assert CEILING.best_rate("bfloat16") == 2e9
    assert CEILING.share("float32", 1e9, 500) == pytest.approx(0.5)
    assert CEILING.share("float32", None, 500) is None


def test_rates_on_a_known_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation takes 10 ms of a clock that the test moves."""
    clock = FakeClock()

    def slow(function: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            clock.pass_ms(10)
            return function(*arguments, **named)  # type: ignore[operator]

        return call

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow(torch.Tensor.__matmul__))
    monkeypatch.setattr(ceiling.F, "conv2d", slow(ceiling.F.conv2d))
    monkeypatch.setattr(torch.Tensor, "copy_", slow(torch.Tensor.copy_))
    got = measure_ceiling(torch.device("cpu"), ["float32", "float32"], clock.timer(), scale=16)
    channels, images, height, width = ceiling.IMAGES["cpu"][1]
    conv = 2 * 9 * channels**2 * images * (height // 16) * (width // 16)
    other = ceiling.IMAGES["cpu"][0]
    conv = max(conv, 2 * 9 * other[0] ** 2 * other[1] * (other[2] // 16) * (other[3] // 16))
    assert got.matmul_flops == {"float32": pytest.approx(2 * 128**3 / 0.01)}
    assert got.conv_flops == {"float32": pytest.approx(conv / 0.01)}
    assert got.copy_bytes == pytest.approx(2 * 2**28 / 16 / 0.01)
