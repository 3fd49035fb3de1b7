"""Training at a tiny size: it learns, and an interruption changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import assemble
import autoencoder
import canvases
import configs
import denoiser
import latent_clips
import numpy as np
import pytest
import run_state
import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.models.activations import GEGLU
from images import PHOTOGRAPHS, Source
from numpy.typing import NDArray

from svd_bench.quality import held_out
from svd_engine.checkpoint.opening import open_checkpoint


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_state, "SAVE_EVERY", 1)
        patch.setattr(canvases, "SHARD", 2)
        patch.setitem(configs.UNET, "block_out_channels", [32, 32, 32])
        patch.setattr(Source.__init__, "__defaults__", (2, 64))
        yield


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "canvases"
    canvases.encode(folder, 0, 1)
    return folder


def state(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return loaded


class Interrupted(Exception):
    pass


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save = run_state.Run.save

    def then_stop(run: run_state.Run) -> None:
        save(run)
        if run.step == steps:
            raise Interrupted

    monkeypatch.setattr(run_state.Run, "save", then_stop)


def test_a_run_that_was_interrupted_gives_the_same_weights(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser.train(tmp_path / "whole", encoded, 1, seed=0, steps=2, count=1)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(Interrupted):
            denoiser.train(tmp_path / "cut", encoded, 1, seed=0, steps=2, count=1)
    assert state(tmp_path / "cut")["step"] == 1
    denoiser.train(tmp_path / "cut", encoded, 1, seed=0, steps=2, count=1)
    whole, cut = state(tmp_path / "whole"), state(tmp_path / "cut")
    assert cut["step"] == whole["step"] == 2
    for part in ("network", "ema"):
        for name, tensor in whole[part].items():
            assert torch.equal(tensor, cut[part][name]), name


def test_the_parts_make_a_checkpoint_that_the_engine_opens(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = autoencoder.held_out
    monkeypatch.setattr(autoencoder, "held_out", lambda *size: dict(list(photographs(*size).items())[:1]))
    autoencoder.train(tmp_path / "vae", seed=0, steps=2, count=2, size=32)
    denoiser.train(tmp_path / "unet", encoded, 1, seed=0, steps=2, count=1)
    log = (tmp_path / "unet" / "log.jsonl").read_text()
    assert '"step": 2' in log
    assert '"loss"' in log
    assert '"flicker"' in log
    assemble.assemble(tmp_path / "vae", tmp_path / "unet", 0.5, 0, tmp_path / "made")
    model = open_checkpoint(str(tmp_path / "made")).model
    assert (model.frames, model.height, model.width, model.latent_scale) == (14, 128, 224, 0.5)
    assert model.max_guidance_scale == configs.GUIDANCE["max_guidance_scale"]
    config = json.loads((tmp_path / "made" / "image_encoder" / "config.json").read_text())
    assert config["dtype"] == "float32"  # as diffusers loads the others


def test_flicker_counts_errors_that_change_from_frame_to_frame() -> None:
    still = torch.randn(2, 1, 4, 8, 14).expand(-1, 3, -1, -1, -1)  # 14: the last blocks are cut
    assert torch.equal(denoiser.flicker_of(still), torch.zeros(2))
    on_and_off = torch.tensor([0.0, 1.0, 0.0])[:, None, None, None].expand(2, 3, 4, 8, 14)
    assert denoiser.flicker_of(on_and_off).tolist() == [(1 + 2**2 + 4**2 + 8**2) / 2] * 2
    independent = torch.randn(16, 14, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    assert denoiser.flicker_of(independent).mean().item() == pytest.approx(len(denoiser.BLOCKS), rel=0.05)


def test_the_last_steps_see_whole_clips_with_less_noise_and_minimise_flicker_too(
    encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[tuple[int, int]] = []
    p_means: list[float] = []
    minimised: list[float] = []
    draw, update = denoiser.draw_batch, run_state.Run.update

    def drawn(data: Any, rng: Any, count: int, window: tuple[int, int], p_mean: float) -> Any:
        windows.append(window)
        p_means.append(p_mean)
        return draw(data, rng, count, window, p_mean)

    def one(unet: Any, batch: dict[str, torch.Tensor], *_: Any) -> torch.Tensor:
        return 1 + 0 * unet.conv_out.bias.sum() * batch["video"]

    def noted(run: run_state.Run, loss: torch.Tensor, lr: float) -> float:
        minimised.append(loss.item())
        return update(run, loss, lr)

    monkeypatch.setattr(denoiser, "draw_batch", drawn)
    monkeypatch.setattr(denoiser, "error_of", one)
    monkeypatch.setattr(denoiser, "flicker_of", lambda error: torch.full((len(error),), 2.0))
    monkeypatch.setattr(run_state.Run, "update", noted)
    denoiser.train(tmp_path / "unet", encoded, 1, seed=0, steps=10, count=2)
    part, whole = denoiser.WINDOW, (16, 28)
    assert windows == [part, part, part, whole, part, part, part, whole, whole, whole]
    assert p_means == [denoiser.P_MEAN] * 7 + [denoiser.P_MEAN_LAST] * 3
    assert minimised == [1] * 7 + [3] * 3


def test_noise_is_drawn_around_its_mean(encoded: Path) -> None:
    data = canvases.load(encoded, 1)
    sigma = denoiser.draw_batch(data, np.random.default_rng(0), 1000, denoiser.WINDOW, 0.5)["sigma"]
    assert sigma.log().mean().item() == pytest.approx(0.5, abs=0.15)
    assert sigma.log().std().item() == pytest.approx(denoiser.P_STD, rel=0.05)


def test_two_products_are_geglu() -> None:
    layer, x = GEGLU(8, 16), torch.randn(3, 8)
    assert torch.allclose(denoiser.split_geglu(layer, x), layer(x), atol=1e-6)


def test_the_network_in_training_computes_what_diffusers_does() -> None:
    """It has its own products where torch's or diffusers' are slow to train on a CPU."""
    ours = denoiser.make(0)
    torch.nn.init.normal_(ours.conv_out.weight, std=0.05)
    theirs = UNetSpatioTemporalConditionModel(**configs.UNET)
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 14, 8, 8, 8), torch.randn(2), torch.randn(2, 1, 32), torch.rand(2, 3) * 100
    with torch.no_grad():
        made, expected = (unet(*inputs, return_dict=False)[0] for unet in (ours, theirs))
    assert expected.std() > 0.1
    assert torch.allclose(made, expected, atol=1e-5)


def test_plain_canvases_are_plain_for_the_most_part() -> None:
    source, rng = Source(0), np.random.default_rng(0)
    blocks = np.stack([source.plain(rng, *canvases.SIZE) for _ in range(20)]).reshape(20, 27, 8, 39, 8, 3)
    deviations = blocks.astype(np.float32).std((2, 4)).max(-1)
    assert 0.6 < (deviations < 8).mean() < 1  # and something is on some of them
    assert np.median(np.ptp(blocks, axis=(1, 2, 3, 4))) > 20


@pytest.mark.parametrize("kind", latent_clips.KINDS)
def test_clips_move_at_the_speed_that_their_condition_says(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents that hold their own position say where each pixel of a clip was taken from."""
    monkeypatch.setattr(latent_clips, "KINDS", {kind: 1.0})
    read = latent_clips.F.grid_sample  # bilinear reading, unlike bicubic, keeps ramps straight
    monkeypatch.setattr(latent_clips.F, "grid_sample", lambda *a, **k: read(*a, **k | {"mode": "bilinear"}))
    y, x = np.mgrid[0:60, 0:80].astype(np.float32)
    canvas = torch.from_numpy(np.stack([x, y, 0 * x, 0 * x]))[None]
    data = {"clean": canvas, "noisy": canvas}
    for seed in range(5):
        clip = latent_clips.draw_clip(data, 0, np.random.default_rng(seed), (8, 8))
        assert torch.allclose(clip.video[0], clip.first, atol=1e-3) or kind == "object"
        positions: NDArray[np.float32] = clip.video[:, :2].numpy()
        moved = np.linalg.norm(np.diff(positions, axis=0), axis=1).mean((1, 2)) * configs.VAE_SCALE
        expected = latent_clips.speed_of(clip.motion_bucket, clip.fps)
        if kind == "zoom":  # the mean distance from the middle of 8x8 pixels is 3.0434 of them
            shrunk = float(np.ptp(positions[-1, 0]) / np.ptp(positions[0, 0]))
            assert shrunk == pytest.approx(np.exp(-13 * expected / 8 / 3.0434), rel=0.02)
        elif kind != "object":
            np.testing.assert_allclose(moved, expected, rtol=0.02)
        assert moved.max() > 0


def test_no_held_out_photograph_is_trained_on() -> None:
    measured = {Path(place).name for _, place, _ in held_out.HELD_OUT.values()}
    assert len(measured) == 5
    assert not measured & set(PHOTOGRAPHS)
