"""Samplers, schedules and guiders as a call has them: what runs, what is counted, whose noise it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from svd_engine import SettingsError, VideoEngine
from svd_engine.bundle.reading import Bundle
from svd_engine.cli.main import main
from svd_engine.observer import Observer
from svd_engine.pipeline import ImagePixels
from svd_engine.sampling.presets import PRESETS, STABILITY
from svd_engine.sampling.registry import GUIDERS, SAMPLERS, SCHEDULES
from svd_engine.serving.watch import Watch
from svd_engine.spec.profile import Profile
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.engine.test_engine import seeded
from tests.engine.test_pipeline import MODEL, PROFILE, SETTINGS, run
from tests.engine.watching import FAKE_CALL, fake_engine
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH

IMAGE = torch.full((1, 3, 64, 128), 0.5)
TWICE = [name for name, sampler in SAMPLERS.items() if sampler.evaluations == 2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted_apart_from_steps(name: str) -> None:
    """By report, observer and progress: three steps to 0 are three evaluations, or five."""
    engine, _ = fake_engine()
    evaluations = 5 if name in TWICE else 3
    told: list[tuple[int, int]] = []

    class Notes(Watch):
        def on_evaluation(self, done: int, evaluations: int) -> None:
            told.append((done, evaluations))
            super().on_evaluation(done, evaluations)

    notes = Notes(engine.model.latent_scale)
    report = engine(IMAGE, generator=seeded(), observer=notes, sampler=name, **FAKE_CALL).report
    assert told == [(done, evaluations) for done in range(1, evaluations + 1)]
    progress = notes.progress
    assert (progress.step, progress.steps) == (3, 3)
    assert (progress.evaluation, progress.evaluations) == (evaluations, evaluations)
    assert (len(report.step_ms), len(report.evaluation_ms)) == (3, evaluations)
    assert sum(report.step_ms) == pytest.approx(sum(report.evaluation_ms))
    assert report.settings.sampler == name
    assert engine.num_timesteps == 3


def test_the_progress_bar_counts_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    engine, _ = fake_engine()
    engine(IMAGE, sampler="heun", **FAKE_CALL)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("name", TWICE)
def test_levels_that_end_above_zero_take_one_evaluation_more(name: str) -> None:
    engine, _ = fake_engine()
    made = engine(IMAGE, generator=seeded(), sampler=name, sigmas=[9.0, 3.0, 1.0], output_type="latent")
    assert len(made.report.evaluation_ms) == 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_callbacks_and_interrupts_work_with_every_sampler(name: str) -> None:
    """An interrupt after two steps leaves what the levels cut off there give."""
    sigmas = [80.0, 20.0, 5.0, 1.0, 0.0]
    engine, _ = fake_engine()
    seen: list[int] = []

    def stop(pipe: Any, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        pipe.interrupt = step == 1
        return tensors

    calls: dict[str, Any] = {"sampler": name, "output_type": "latent"}
    stopped = engine(IMAGE, generator=seeded(), sigmas=sigmas, callback_on_step_end=stop, **calls)
    cut = engine(IMAGE, generator=seeded(), sigmas=sigmas[:3], **calls)
    assert seen == [0, 1]
    assert torch.equal(stopped.frames, cut.frames)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_its_videos_one_by_one(name: str) -> None:
    """Each with its generator, whose draws no other video shares."""
    settings = dataclasses.replace(SETTINGS, sampler=name, churn=1.0 if SAMPLERS[name].churns else 0.0)

    def noise(seeds: list[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    pixels = torch.linspace(-1, 1, 3 * 64 * 128).reshape(1, 3, 64, 128)
    clip = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)

    def made(seeds: list[int]) -> Tensor:
        count = len(seeds)
        profile = dataclasses.replace(PROFILE, batch=count)
        return run(
            profile, settings, decode=False, generator=noise(seeds),
            image=ImagePixels(vae=pixels.expand(count, -1, -1, -1), clip=clip.expand(count, -1, -1, -1)),
        )[0]  # fmt: skip

    together, first, second = made([3, 4]), made([3]), made([4])
    torch.testing.assert_close(together, torch.cat([first, second]), rtol=0, atol=1e-5)
    assert torch.equal(made([3, 4]), together)
    assert not torch.equal(first, second)


@pytest.fixture(scope="module")
def over_onnxruntime(tiny_bundle: Path) -> Iterator[VideoEngine]:
    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        yield engine


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("tiny_engine", ["eager"], indirect=True)
def test_every_backend_gives_the_same_video(
    tiny_engine: VideoEngine, over_onnxruntime: VideoEngine, name: str
) -> None:
    """Eager torch and ONNX Runtime, within 1e-4, and the same bits for the same seed on each."""
    made = [
        engine(
            torch.rand(1, 3, 32, 32, generator=seeded()), height=HEIGHT, width=WIDTH, num_frames=FRAMES,
            num_inference_steps=4, decode_chunk_size=CHUNK, sampler=name, schedule="exponential",
                guider="triangle",
            generator=seeded(), output_type="pt",
        ).frames
        for engine in (tiny_engine, over_onnxruntime, over_onnxruntime)
    ]  # fmt: skip
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-4)
    assert torch.equal(made[1], made[2])


def test_each_choice_makes_another_video() -> None:
    """None is swallowed on its way: every sampler, schedule, guider, factor and the churn shows."""
    engine, _ = fake_engine()
    choices: list[dict[str, Any]] = [
        {},
        *({"sampler": name} for name in SAMPLERS if name != "euler"),
        *({"schedule": name} for name in SCHEDULES if name != "karras"),
        *({"guider": name} for name in GUIDERS if name not in ("linear", "trapezoid")),
        {"guidance_scales": [1.0, 4.0, 1.0, 2.0, 3.0]},
        {"churn": 1.0},
        {"rho": 3.0},
        {"sampler": "heun", "churn": 1.0},
    ]
    frames = [
        engine(IMAGE, generator=seeded(), num_inference_steps=4, output_type="latent", **choice).frames
        for choice in choices
    ]
    same = [(a, b) for a in range(len(frames)) for b in range(a) if torch.equal(frames[a], frames[b])]
    assert [(choices[a], choices[b]) for a, b in same] == []


def test_a_guider_gives_the_scales_that_callbacks_read() -> None:
    engine, _ = fake_engine()
    engine(IMAGE, guider="triangle", min_guidance_scale=1.0, max_guidance_scale=2.0, **FAKE_CALL)
    assert engine.guidance_scale.flatten().tolist() == [1.0, 1.5, 2.0, 1.5, 1.0]
    engine(IMAGE, guidance_scales=[1.0, 4.0, 1.0, 2.0, 3.0], **FAKE_CALL)
    assert engine.guidance_scale.flatten().tolist() == [1.0, 4.0, 1.0, 2.0, 3.0]
    assert engine.do_classifier_free_guidance


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampler": "ddim"}, "sampler: expected euler, heun, "),
        ({"schedule": "lcm", "num_inference_steps": 41}, 'expected 1 to 40 with schedule "lcm"'),
        ({"sampler": "lms", "churn": 1.0}, "churn: expected its default beside the sampler lms"),
        ({"guidance_scales": [1.0, 2.0]}, "guidance_scales: expected 5 numbers"),
    ],
)
def test_what_cannot_be_sampled_is_refused_before_anything_runs(wrong: dict[str, Any], message: str) -> None:
    engine, backend = fake_engine()
    with pytest.raises(SettingsError, match=message):
        engine(IMAGE, observer=Observer(), **wrong)
    assert backend.open_now == []


# Presets


@pytest.mark.parametrize(("frames", "expected"), [(14, (25, 1.0, 2.5)), (25, (30, 1.5, 3.0))])
def test_the_preset_of_stability(frames: int, expected: tuple[float, ...]) -> None:
    recommended = PRESETS["sgm"](dataclasses.replace(MODEL, frames=frames))
    assert tuple(recommended.values()) == expected
    assert list(recommended) == ["num_inference_steps", "min_guidance_scale", "max_guidance_scale"]


def test_the_preset_of_animatelcm() -> None:
    """Four evaluations at the levels of its own scheduler, each with one half of guidance."""
    engine, _ = fake_engine()
    output = engine(IMAGE, **FAKE_CALL | engine.preset("animatelcm"))
    settings = output.report.settings
    assert (settings.sampler, settings.schedule, settings.steps) == ("lcm", "lcm", 4)
    assert len(output.report.evaluation_ms) == 4
    assert Profile.of_request(settings, 1).guidance == "single"
    levels = SCHEDULES["lcm"].levels(4, 0.002, 700.0, 7.0)
    assert levels.tolist() == pytest.approx([700, 128.56, 13.678, 0.49688, 0], rel=1e-4)


def test_presets_that_there_are_not() -> None:
    engine, _ = fake_engine()  # of 5 frames
    with pytest.raises(
        SettingsError, match=r'preset "sgm": expected a model of 14 frames, .* got fake, of 5'
    ):
        engine.preset("sgm")
    with pytest.raises(SettingsError, match="preset: expected sgm, animatelcm, got 'comfy'"):
        engine.preset("comfy")


def test_the_command_takes_names_and_a_preset(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset gives what no option names: here the first scale, not the last one nor the steps."""
    monkeypatch.setitem(STABILITY, Bundle(tiny_bundle).manifest.model.frames, (30, 1.5, 3.5))
    code = call(
        main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.png", "--bundle", tiny_bundle, "--device", "cpu",
        "--sampler", "heun", "--schedule", "ays", "--guider", "triangle", "--churn", "0.5",
        "--preset", "sgm", "--steps", 3, "--max-guidance-scale", 2, "--report", tmp_path / "run.json",
    )  # fmt: skip
    assert code == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    names = ("sampler", "schedule", "guider", "churn", "steps", "min_guidance_scale", "max_guidance_scale")
    assert [settings[name] for name in names] == ["heun", "ays", "triangle", 0.5, 3, 1.5, 2.0]
    assert "5/5" in capsys.readouterr().err  # evaluations


def test_the_command_says_what_a_preset_and_an_option_are_at_odds_on(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(STABILITY, FRAMES, (30, 1.5, 3.5))
    arguments = ("--bundle", tiny_bundle, "--preset", "sgm", "--guider", "constant")
    assert call(main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.png", *arguments) == 2
    assert "error: min_guidance_scale: expected its default beside the guider" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_noise_levels_and_scales(tiny_bundle: Path, tmp_path: Path) -> None:
    scales = [1.0 + 0.5 * frame for frame in range(FRAMES)]
    code = call(
        main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.png", "--bundle", tiny_bundle, "--device", "cpu",
        "--sigmas", "20, 1,0", "--guidance-scales", ",".join(map(str, scales)),
        "--report", tmp_path / "run.json",
    )  # fmt: skip
    assert code == 0
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert (settings["sigmas"], settings["steps"]) == ([20.0, 1.0, 0.0], 2)
    assert settings["guidance_scales"] == scales
