"""Arguments of another kind than a call takes: our errors, or the value that is meant."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svd_engine import SettingsError, VideoEngine, VideoOutput, load_image, write_video
from svd_engine.errors import NotOffered
from svd_engine.values import at_least, check_seed, finite
from tests.engine.watching import fake_engine


@pytest.mark.parametrize("name", ["num_timesteps", "guidance_scale", "interrupt", "_guidance_scale"])
def test_what_belongs_to_a_call_before_there_was_one(name: str) -> None:
    engine, _ = fake_engine()
    with pytest.raises(NotOffered, match=r"expected a call of the engine, .* got none so far"):
        getattr(engine, name)
    assert not hasattr(engine, name)


@pytest.mark.parametrize("name", ["interrupt", "_guidance_scale"])
def test_set_before_a_call(name: str) -> None:
    engine, _ = fake_engine()
    with pytest.raises(NotOffered, match="got none so far"):
        setattr(engine, name, 1.0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"cancel": 3}, "cancel: expected a threading.Event, .* got int"),
        ({"cancel": lambda: True}, "cancel: .* got function"),
        ({"observer": 3}, "observer: expected an svd_engine.observer.Observer, got int"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_watchers_of_a_call(argument: dict[str, Any], message: str) -> None:
    engine, _ = fake_engine()
    with pytest.raises(SettingsError, match=message):
        engine(torch.zeros(1, 3, 8, 8), **argument)
    assert not engine.residency._networks


@pytest.mark.parametrize("names", ["fused-qkv", 3])
def test_rewrites_left_out_are_a_list(names: Any) -> None:
    with pytest.raises(SettingsError, match="without_rewrites: expected a list of names"):
        VideoEngine.from_checkpoint("demo", without_rewrites=names, device="cpu")


@pytest.mark.parametrize("swap", ["yes", 1, None])
def test_swapping_is_true_or_false(tiny_bundle: Path, tiny_checkpoint: Path, swap: Any) -> None:
    with pytest.raises(SettingsError, match=f"swap_networks: expected True or False, got {swap!r}"):
        VideoEngine.from_bundle(tiny_bundle, swap_networks=swap)
    with pytest.raises(SettingsError, match="swap_networks: expected True or False"):
        VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", swap_networks=swap)


@pytest.mark.parametrize("path", [None, 3, b"bytes.png", ["a.mp4"]])
def test_a_path_is_a_path(tiny_engine: VideoEngine, path: Any) -> None:
    message = f"expected a path, as a string or pathlib.Path, got an object of type {type(path).__name__}"
    with pytest.raises(SettingsError, match=f"image: {message}"):
        load_image(path)
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(SettingsError, match=f"output: {message}"):
        write_video(frames, path, 7)
    with pytest.raises(SettingsError, match=f"output: {message}"):
        VideoOutput(torch.zeros(1, 2, 3, 16, 16), report=None).save(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, np.int64(1), torch.tensor(1), Fraction(1)])
def test_seeds_of_any_kind(seed: object) -> None:
    assert check_seed(seed) == 1


def test_numbers_of_any_kind() -> None:
    assert at_least("fps", Fraction(7), 1) == at_least("fps", Decimal(7), 1) == 7
    assert finite("motion_bucket_id", Fraction(127, 2)) == 63.5


def test_a_number_beyond_float32() -> None:
    with pytest.raises(SettingsError, match="expected a number that float32 holds, got 1e\\+300"):
        finite("max_guidance_scale", 1e300)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_latents_that_are_not_finite(bad: float) -> None:
    engine, _ = fake_engine()
    size = (engine.default.height // 8, engine.default.width // 8)
    latents = torch.full((1, engine.default.frames, 4, *size), bad)
    with pytest.raises(SettingsError, match="latents: expected finite real numbers"):
        engine(torch.zeros(1, 3, 8, 8), latents=latents, num_inference_steps=1)
