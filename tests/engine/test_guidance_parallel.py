"""Both halves of guidance at the same time, on two devices: to the bit what one device makes of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.cli.main import main
from svd_engine.errors import BackendUnavailable, Cancelled, ProfileError, SettingsError
from svd_engine.guidance_parallel import OtherHalf
from svd_engine.spec.reuse import Reuse
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import damage
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH

TWO = ("cpu", "cpu")


def single(bundle: Path, into: Path) -> Path:
    """The bundle with its profile of single guidance alone: what one device then runs, half after half."""
    copy = damage.copy(bundle, into)
    damage.edit(copy, lambda m: m.update(profiles=[p for p in m["profiles"] if p["guidance"] == "single"]))
    return copy


@pytest.fixture(scope="module", params=["eager", "onnxruntime"])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[VideoEngine, VideoEngine]]:
    """On two devices, and on one."""
    if request.param == "eager":
        folder = request.getfixturevalue("tiny_checkpoint")
        both = VideoEngine.from_checkpoint(folder, backend="eager", devices=TWO)
        one = VideoEngine.from_checkpoint(folder, backend="eager", device="cpu", memory=None)
        one.source = replace(one.source, profile_for=both.source.profile_for)  # half after half, too
    else:
        bundle = request.getfixturevalue("tiny_bundle")
        both = VideoEngine.from_bundle(bundle, devices=TWO)
        one = VideoEngine.from_bundle(single(bundle, tmp_path_factory.mktemp("one")), device="cpu")
    with both, one:
        yield both, one


def made(engine: VideoEngine, videos: int = 1, **settings: Any) -> Any:
    image = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    return engine(
        image, HEIGHT, WIDTH, FRAMES, 3, generator=torch.Generator().manual_seed(0), output_type="pt",
        decode_chunk_size=CHUNK, num_videos_per_prompt=videos, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("settings", [{}, {"sampler": "heun"}, {"videos": 2}], ids=str)
def test_the_same_video(engines: tuple[VideoEngine, VideoEngine], settings: dict[str, Any]) -> None:
    both, one = (made(engine, **settings) for engine in engines)
    assert torch.equal(both.frames, one.frames)
    report = both.report
    assert "single guidance" in report.profile
    assert list(report.stages)[-1] == "denoiser, unconditional half"
    assert one.report.exchanged_bytes == 0


def test_without_guidance_the_second_stands_still(engines: tuple[VideoEngine, VideoEngine]) -> None:
    both, one = (made(engine, min_guidance_scale=1.0, max_guidance_scale=1.0) for engine in engines)
    assert torch.equal(both.frames, one.frames)
    assert both.report.exchanged_bytes == 0


def test_what_passes_between_them(engines: tuple[VideoEngine, VideoEngine]) -> None:
    """x and sigma there, D_u back in every step; what stays the same once."""
    latent = FRAMES * 4 * HEIGHT // 2 * WIDTH // 2  # the tiny VAE halves once
    lasting = 3 + 4 * HEIGHT // 2 * WIDTH // 2 + 32  # time_ids, first latent, embedding
    assert made(engines[0]).report.exchanged_bytes == 4 * (3 * (2 * latent + 1) + lasting)


def test_both_halves_run_at_the_same_time(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits in its first run until the other has begun."""
    met = threading.Barrier(2, timeout=60)
    real = OtherHalf.beside

    def beside(self: OtherHalf, here: Any, there: Any, **tensors: Any) -> Any:
        def meet(work: Any) -> Any:
            return lambda *given: (met.wait(), work(*given))[1]

        return real(self, meet(here), meet(there), **tensors)

    monkeypatch.setattr(OtherHalf, "beside", beside)
    with VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", devices=TWO) as engine:
        made(engine)


def test_an_error_there_ends_the_call_and_the_engine_goes_on(
    engines: tuple[VideoEngine, VideoEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = engines[0]
    expected = made(both).frames
    other = both.other_half
    assert other is not None

    def fails(inputs: Any) -> Any:
        raise RuntimeError("the second device fails")

    with monkeypatch.context() as patch:
        for network in other._networks.values():
            patch.setattr(network, "run", fails)
        with pytest.raises(RuntimeError, match="the second device fails"):
            made(both)
    assert torch.equal(made(both).frames, expected)
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        made(both, cancel=cancel, callback_on_step_end=lambda *_: cancel.set() or {})
    assert torch.equal(made(both).frames, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"devices": "cpu,cpu"},
            "devices: expected two devices, one for each half of guidance, got 'cpu,cpu'",
        ),
        ({"devices": ("cpu",)}, "expected two devices"),
        ({"devices": TWO, "device": "cpu"}, "expected no device beside it, got device='cpu'"),
        ({"devices": TWO, "swap_networks": True}, "expected no swap_networks beside it"),
        ({"devices": TWO, "reuse": Reuse(2)}, "expected no reuse beside it"),
        ({"devices": ("cpu", "gpu")}, "device: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be(tiny_checkpoint: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        VideoEngine.from_checkpoint(tiny_checkpoint, **given)
    assert message in str(caught.value)


def test_one_gpu_twice(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svd_engine.residency.source.resolve", torch.device)
    with pytest.raises(SettingsError, match=r'two different GPUs, got cuda:0 twice\. Pass device="cuda:0"'):
        VideoEngine.from_checkpoint(tiny_checkpoint, devices=("cuda:0", "cuda:0"))


def test_a_gpu_that_is_not_here(tiny_checkpoint: Path) -> None:
    if torch.cuda.device_count() > 99:
        pytest.skip("a machine of fewer than 100 GPUs would run this")
    with pytest.raises(BackendUnavailable, match="cuda:99"):
        VideoEngine.from_checkpoint(tiny_checkpoint, devices=("cpu", "cuda:99"))


def test_two_kinds(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svd_engine.residency.source.resolve", torch.device)
    for two in (("cpu", "cuda:0"), ("cuda:0", "cpu")):
        with pytest.raises(SettingsError, match=f"two of one kind.*got {two[0]} and {two[1]}"):
            VideoEngine.from_checkpoint(tiny_checkpoint, devices=two)


def test_a_bundle_without_single_guidance(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = damage.copy(tiny_bundle, tmp_path)
    damage.edit(copy, lambda m: m.update(profiles=[p for p in m["profiles"] if p["guidance"] == "batched"]))
    with (
        VideoEngine.from_bundle(copy, devices=TWO) as engine,
        pytest.raises(ProfileError, match=r"a profile of single guidance.*--guidance single"),
    ):
        made(engine)


def test_the_command(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate = ("generate", PHOTOGRAPH, "--bundle", tiny_bundle, "--steps", 1, "-o", tmp_path / "a.png")
    assert call(main, *generate, "--devices", "cpu, cpu") == 0
    assert call(main, *generate, "--devices", "cpu") == 2
    assert "devices: expected two devices" in capsys.readouterr().err
