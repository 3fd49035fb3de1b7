"""What a callback may read and change of a running call, as diffusers' documentation shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine import SettingsError, VideoEngine
from svd_engine.steering import Steered, Steering
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH

STEPS = 3
SHAPE = (1, FRAMES, 1, 1, 1)
CALL: dict[str, Any] = {
    "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "pt"
}  # fmt: skip


def frames(engine: VideoEngine, act: Callable[[Any, int], object] | None = None, **change: Any) -> Tensor:
    """A video with a callback that acts and changes no latents, or without one."""

    def callback(pipe: Any, step: int, _: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert act is not None
        act(pipe, step)
        return tensors

    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    call = {"callback_on_step_end": callback if act else None, **CALL, **change}
    result: Tensor = engine(image, generator=torch.Generator().manual_seed(0), **call).frames
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


# Reading


def test_a_callback_reads_what_diffusers_callbacks_read(
    diffusers_pipeline: Any, tiny_engine: VideoEngine
) -> None:
    """The same values as in diffusers, at every step."""
    seen: dict[str, list[Any]] = {}
    for owner in (diffusers_pipeline, tiny_engine):
        rows = seen[type(owner).__name__] = []
        frames(
            owner,
            lambda pipe, step, rows=rows: rows.append(
                (
                    step,
                    pipe.num_timesteps,
                    pipe.guidance_scale.tolist(),
                    bool(pipe.do_classifier_free_guidance),
                )
            ),
        )
    theirs, ours = seen.values()
    assert ours == theirs
    assert [row[:2] for row in ours] == [(step, STEPS) for step in range(STEPS)]
    assert torch.tensor(ours[0][2]).shape == SHAPE


def test_given_sigmas_count_as_steps(tiny_engine: VideoEngine) -> None:
    frames(tiny_engine, sigmas=[80.0, 1.0, 0.0])
    assert tiny_engine.num_timesteps == 2
    assert tiny_engine.interrupt is False


def test_before_the_first_call_there_is_nothing_to_read() -> None:
    for name in ("num_timesteps", "guidance_scale", "do_classifier_free_guidance", "interrupt"):
        assert not hasattr(Steered(), name)
        with pytest.raises(AttributeError, match="expected a call of the engine"):
            getattr(Steered(), name)


# Guidance


@pytest.mark.parametrize("guidance", ["batched", "single"])
def test_guidance_that_falls_to_one_acts(tiny_engine: VideoEngine, guidance: str) -> None:
    """min 3, max 1 is min 3, max 1.000001 to rounding, and nothing like no guidance."""
    engine = with_guidance(tiny_engine, guidance)
    falls, nearly, without = (
        frames(engine, min_guidance_scale=first, max_guidance_scale=last)
        for first, last in ((3.0, 1.0), (3.0, 1.000001), (1.0, 1.0))
    )
    assert distance(falls, nearly) < 1e-4
    assert distance(falls, without) > 0.01
    assert engine.do_classifier_free_guidance is False  # the last call


def with_guidance(engine: VideoEngine, guidance: str) -> VideoEngine:
    import dataclasses

    source = engine.source
    return VideoEngine(
        dataclasses.replace(
            source,
            planner=None,
            profile_for=lambda s, n: dataclasses.replace(source.profile_for(s, n), guidance=guidance),
        )
    )


@pytest.mark.parametrize("guidance", ["batched", "single"])
def test_a_callback_ends_guidance(tiny_engine: VideoEngine, guidance: str) -> None:
    """`pipe._guidance_scale = 0.0`, of diffusers' documentation, is from the next step on no guidance."""
    engine = with_guidance(tiny_engine, guidance)

    def end(pipe: Any, step: int) -> None:
        if step == 1:
            pipe._guidance_scale = 0.0
            assert (pipe.guidance_scale, pipe.do_classifier_free_guidance) == (0.0, False)

    latent: dict[str, Any] = {"output_type": "latent"}  # in pixels of tiny networks less is seen
    ended, by_one = (
        frames(engine, end, **latent),
        frames(engine, lambda pipe, step: setattr(pipe, "_guidance_scale", 1.0), **latent),
    )
    guided, without = frames(engine, **latent), frames(engine, max_guidance_scale=1.0, **latent)
    assert distance(ended, guided) > 1e-3
    assert distance(ended, without) > 1e-3
    assert distance(by_one, guided) > 1e-3


def test_ended_guidance_is_what_the_latents_so_far_give_without_it(tiny_engine: VideoEngine) -> None:
    """Two steps with guidance, and from their latents two without, put together from two calls."""
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.0]

    def end(pipe: Any, step: int) -> None:
        if step == 1:
            pipe._guidance_scale = 0.0

    expected = frames(tiny_engine, end, sigmas=sigmas)
    half = frames(tiny_engine, sigmas=sigmas[:3], output_type="latent")
    rest = half / (sigmas[2] ** 2 + 1) ** 0.5  # the call scales what it is given
    got = frames(tiny_engine, sigmas=sigmas[2:], latents=rest, max_guidance_scale=1.0)
    assert distance(got, expected) < 1e-4


@pytest.mark.parametrize(
    "set_scale",
    [
        lambda pipe, scale: setattr(pipe, "_guidance_scale", scale * 2),
        lambda pipe, scale: pipe.guidance_scale.mul_(2),
        lambda pipe, scale: setattr(pipe, "_guidance_scale", 2 * scale.expand(1, FRAMES, 1, 1, 1)),
    ],
    ids=["a tensor", "in place", "a view"],
)
def test_a_callback_sets_another_scale(
    diffusers_pipeline: Any, tiny_engine: VideoEngine, set_scale: Callable[[Any, Tensor], object]
) -> None:
    """Diffusers does the same with it."""

    def double(pipe: Any, step: int) -> None:
        if step == 1:
            set_scale(pipe, pipe.guidance_scale)

    changed, theirs = (
        frames(pipe, double, decode_chunk_size=CHUNK) for pipe in (tiny_engine, diffusers_pipeline)
    )
    assert distance(changed, theirs) < 1e-4
    assert distance(changed, frames(tiny_engine, decode_chunk_size=CHUNK)) > 1e-3


def test_one_number_is_the_scale_of_every_frame(tiny_engine: VideoEngine) -> None:
    flat = frames(tiny_engine, lambda pipe, step: setattr(pipe, "_guidance_scale", 2.5))
    ramp = torch.full(SHAPE, 2.5)
    assert torch.equal(flat, frames(tiny_engine, lambda pipe, step: setattr(pipe, "_guidance_scale", ramp)))


@pytest.mark.parametrize(
    ("scale", "got"),
    [
        ("3", "'3'"),
        (None, "None"),
        (float("nan"), "nan"),
        (torch.ones(FRAMES), f"[{FRAMES}]"),
        (torch.ones(2, FRAMES, 1, 1, 1), f"[2, {FRAMES}, 1, 1, 1]"),
        (torch.full(SHAPE, float("inf")), "NaN or infinity"),
    ],
)
def test_what_is_no_guidance_scale(scale: Any, got: str) -> None:
    steering = Steering(STEPS, torch.ones(1, FRAMES))
    with pytest.raises(SettingsError, match="guidance_scale: expected") as caught:
        steering.guide(scale)
    assert caught.value.got == got


# Interrupting


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_an_interrupt_skips_the_steps_that_are_left(tiny_engine: VideoEngine, name: str) -> None:
    """And what there is, is decoded: the video of the schedule cut off there."""
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.0]
    steps: list[int] = []

    def stop(pipe: Any, step: int) -> None:
        steps.append(step)
        if step == 1:
            setattr(pipe, name, True)
            assert pipe.interrupt is True

    stopped = frames(tiny_engine, stop, sigmas=sigmas)
    assert steps == [0, 1]
    assert torch.equal(stopped, frames(tiny_engine, sigmas=sigmas[:3]))
    assert tiny_engine.interrupt is False  # a new call starts anew
    assert tiny_engine.num_timesteps == 2


# What a callback gives back


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "what callback_on_step_end returned: expected a dict .* got None. Return callback_kwargs"),
        (torch.zeros(1), "expected a dict of none or some of latents, got tensor"),
        ({"prompt_embeds": 1}, "expected a dict of none or some of latents, got a dict of 'prompt_embeds'"),
        ({"latents": None}, "latents of callback_on_step_end: expected shape .* got no tensor: NoneType"),
        ({"latents": torch.zeros(1, 4)}, r"latents of callback_on_step_end: expected shape .* got \[1, 4\]"),
    ],
)
def test_a_callback_that_gives_back_something_else(
    tiny_engine: VideoEngine, returned: Any, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        tiny_engine(torch.rand(1, 3, 32, 32), callback_on_step_end=lambda *_: returned, **CALL)


def test_latents_of_another_type_are_float32_again(tiny_engine: VideoEngine) -> None:
    def halve(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"].double()}

    image = torch.rand(1, 3, 32, 32)
    assert tiny_engine(image, callback_on_step_end=halve, **CALL).frames.dtype == torch.float32


# The progress bar


def test_a_progress_bar_is_shown_and_can_be_hidden(
    tiny_engine: VideoEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = VideoEngine(tiny_engine.source)
    frames(engine)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err
    engine.set_progress_bar_config(desc="clip")
    frames(engine)
    assert "clip: 100%" in capsys.readouterr().err
    engine.set_progress_bar_config(disable=True)
    frames(engine)
    assert capsys.readouterr().err == ""


def test_the_progress_bar_is_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    with Steered().progress_bar(total=3) as bar:
        bar.update()
    assert list(Steered().progress_bar([1, 2])) == [1, 2]
    assert "1/3" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="progress_bar: expected an iterable, or total, got neither"):
        Steered().progress_bar()
    with pytest.raises(SettingsError, match=r"progress bar option: expected one of tqdm's .* got colour_of"):
        Steered().set_progress_bar_config(colour_of="red")
