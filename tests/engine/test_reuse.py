"""Reuse between evaluations: the shallow denoiser, which evaluations run it, and what is said of it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from svd_engine import BackendUnavailable, CheckpointError, Reuse, SettingsError, VideoEngine
from svd_engine.backends.torch.compiled import CompiledBackend
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.checkpoint.configs import unet_levels
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.cli.main import main
from svd_engine.networks.denoiser import Denoiser, GuidedDenoiser
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.networks.reuse import ReusingDenoiser
from svd_engine.networks.rewrites import REWRITES, apply_rewrites
from svd_engine.observer import Observer
from svd_engine.report import RunReport
from svd_engine.sampling.reuse import ReusePolicy
from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.profile import GuidanceMode, Profile
from svd_engine.spec.reuse import Feature, feature_of, reusing_specs
from svd_engine.spec.tables import denoiser
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.test_engine import seeded
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH

IMAGE = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
CALL: dict[str, Any] = {
    "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 5, "output_type": "latent",
}  # fmt: skip
LEVELS = ([32, 64], 1)  # of `tiny_checkpoint`
ODD = HEIGHT + 2  # latents of 17 rows


# The networks


@pytest.fixture(scope="module")
def unet(tiny_checkpoint: Path) -> nn.Module:
    return open_checkpoint(str(tiny_checkpoint)).load("unet", torch.float32)


def specs_at(tiny_checkpoint: Path, guidance: GuidanceMode, branch: int, height: int = HEIGHT) -> Any:
    arch = open_checkpoint(str(tiny_checkpoint)).model.architecture
    plain = denoiser(Profile(FRAMES, height, WIDTH, 2, guidance), arch, FLOAT32)
    return plain, *reusing_specs(plain, feature_of(*LEVELS, branch))


@pytest.mark.parametrize(
    ("branch", "guidance", "rewritten", "height"),
    [
        *((branch, "batched", rewritten, HEIGHT) for branch in (0, 1, 2) for rewritten in (True, False)),
        (1, "single", True, HEIGHT), (1, "single", False, HEIGHT),
        (0, "single", True, ODD), (2, "batched", True, ODD), (2, "single", False, ODD),
    ],
)  # fmt: skip
@torch.no_grad()
def test_with_a_feature_of_the_same_inputs_both_are_the_denoiser(
    tiny_checkpoint: Path, unet: nn.Module, branch: int, guidance: GuidanceMode, rewritten: bool, height: int
) -> None:
    """At the last branch nothing but the middle is reused."""
    plain, full, shallow = specs_at(tiny_checkpoint, guidance, branch, height)
    network = copy.deepcopy(unet)
    if rewritten:
        apply_rewrites(network, ["phase-upsample"] if height % 4 else [])  # which wants even latents
    inputs = example_inputs(plain)
    expected = (GuidedDenoiser if guidance == "batched" else Denoiser)(network)(**inputs)
    denoised, feature = ReusingDenoiser(network, full.kept)(**inputs)
    assert feature.shape == full.outputs[1].shape == shallow.inputs[-1].shape
    tolerance = 1e-6 if rewritten else 5e-5  # diffusers' own forward rounds otherwise, at values of 30
    torch.testing.assert_close(denoised, expected, rtol=0, atol=tolerance)
    again = ReusingDenoiser(network, shallow.kept)(**inputs, feature=feature)
    torch.testing.assert_close(again, expected, rtol=0, atol=tolerance)
    assert not torch.equal(ReusingDenoiser(network, shallow.kept)(**inputs, feature=0 * feature), expected)


@torch.no_grad()
def test_a_shallow_denoiser_runs_the_outermost_modules_only(tiny_checkpoint: Path, unet: nn.Module) -> None:
    _, full, shallow = specs_at(tiny_checkpoint, "single", 0)
    network = copy.deepcopy(unet)
    module = ReusingDenoiser(network, shallow.kept)
    ran: list[str] = []
    for name, part in network.named_modules():
        if name.split(".")[-2:-1] == ["resnets"]:
            part.register_forward_hook(lambda *_, name=name: ran.append(name))
    module(**example_inputs(shallow))
    assert ran == [
        "down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1",
    ]  # fmt: skip
    assert full.kept == 2


def test_torch_compile_takes_both_whole(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiled backend runs them, traced without a graph break; the compiler's code is not run."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    _, full, shallow = specs_at(tiny_checkpoint, "batched", 0)
    modules = Modules(open_checkpoint(str(tiny_checkpoint)), rewrites=REWRITES)
    for spec in (full, shallow):
        inputs = example_inputs(spec)
        expected = EagerBackend(modules, torch.device("cpu")).open(spec)(**inputs)
        traced = CompiledBackend(modules, torch.device("cpu")).open(spec)(**inputs)
        torch.testing.assert_close(traced, expected, rtol=0, atol=1e-6)


def test_one_checkpoint_serves_all_three_with_the_same_weights(tiny_checkpoint: Path) -> None:
    modules = Modules(open_checkpoint(str(tiny_checkpoint)), rewrites=REWRITES)
    opened = [modules.network(spec) for spec in specs_at(tiny_checkpoint, "batched", 1)]
    assert len({id(module) for module in opened}) == 3
    assert len({id(module.unet) for module in opened}) == 1


def test_another_unet_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="reuse: expected diffusers' UNet, got Linear is not"):
        ReusingDenoiser(nn.Linear(1, 1), 2)


# SVD's UNet: DeepCache's branch 0 enters up_blocks.3 at resnet 1, with 320 channels; branch 2 the block below
@pytest.mark.parametrize(
    ("branch", "expected"),
    [
        (0, Feature(2, 320, 1)), (1, Feature(3, 640, 1)), (2, Feature(4, 640, 2)), (4, Feature(6, 1280, 2)),
        (10, Feature(12, 1280, 8)),
    ],
)  # fmt: skip
def test_the_feature_of_svd(branch: int, expected: Feature) -> None:
    assert feature_of([320, 640, 1280, 1280], 2, branch) == expected


@pytest.mark.parametrize("layers", [1, [1, 1]])
def test_the_levels_of_a_checkpoint(tiny_checkpoint: Path, layers: Any) -> None:
    configs = open_checkpoint(str(tiny_checkpoint)).configs
    unet = {**configs["unet"], "layers_per_block": layers}
    assert unet_levels({**configs, "unet": unet}) == LEVELS
    with pytest.raises(
        CheckpointError, match=r"layers_per_block of the UNet: expected the same at every level"
    ):
        unet_levels({**configs, "unet": {**unet, "layers_per_block": [1, 2]}})


# Which evaluations


def shallow(reuse: Reuse, inputs: list[Tensor]) -> list[bool]:
    policy = ReusePolicy(reuse)
    return [policy.reuses(x, torch.tensor(1e-6)) for x in inputs]


def test_one_of_so_many_is_full() -> None:
    same = [torch.ones(2)] * 7
    assert shallow(Reuse(3), same) == [False, True, True, False, True, True, False]
    assert shallow(Reuse(2), same) == [False, True] * 3 + [False]


def test_a_threshold_stops_reuse_when_the_input_has_changed() -> None:
    """By 4 % a time: two stay below a tenth, the third does not."""
    growing = [torch.full((2,), 1.04**n) for n in range(7)]
    assert shallow(Reuse(10, threshold=0.1), growing) == [False, True, True, False, True, True, False]
    assert shallow(Reuse(2, threshold=0.1), growing) == [False, True, False, True, False, True, False]
    assert shallow(Reuse(10, threshold=0), growing) == [False] * 7


def test_nothing_is_reused_that_is_not_there() -> None:
    policy = ReusePolicy(Reuse(3))
    x, sigma = torch.ones(2), torch.tensor(1.0)
    policy.reuses(x, sigma)
    assert [policy.reuses(x, sigma, possible=False), policy.reuses(x, sigma)] == [False, True]


# A call


def opened(tiny_checkpoint: Path, reuse: Reuse | None = None) -> VideoEngine:
    return VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu", reuse=reuse)


@pytest.mark.parametrize("guided", [True, False])
def test_a_call_reuses_and_says_where(tiny_checkpoint: Path, guided: bool) -> None:
    ran: list[str] = []

    class Notes(Observer):
        def on_network_run(self, network: str) -> None:
            ran.append(network)

    call = {**CALL, "max_guidance_scale": 3.0 if guided else 1.0}
    with opened(tiny_checkpoint) as plain, opened(tiny_checkpoint, Reuse(2)) as engine:
        exact = plain(IMAGE, generator=seeded(), **call)
        made = engine(IMAGE, generator=seeded(), observer=Notes(), **call)
        again = engine(IMAGE, generator=seeded(), **call)
    assert [name for name in ran if "denoiser" in name] == ["denoiser", "shallow_denoiser"] * 2 + ["denoiser"]
    report = RunReport.model_validate_json(made.report.model_dump_json())
    assert report.reuse == Reuse(2, branch=0)
    assert report.shallow_evaluations == [1, 3]
    assert list(report.stages) == [
        "image_encoder", "vae_encoder", "denoiser", "shallow_denoiser", "vae_decoder",
    ]  # fmt: skip
    assert len(report.evaluation_ms) == 5
    assert (exact.report.reuse, exact.report.shallow_evaluations) == (None, [])
    assert torch.equal(made.frames, again.frames)
    distance = float((made.frames - exact.frames).abs().max())
    assert distance > 0  # lossy
    assert made.frames.isfinite().all()


def test_swapped_networks_reuse_too(tiny_checkpoint: Path) -> None:
    with opened(tiny_checkpoint, Reuse(2)) as engine:
        expected = engine(IMAGE, generator=seeded(), **CALL)
    where = {"backend": "eager", "device": "cpu", "swap_networks": True}
    with VideoEngine.from_checkpoint(str(tiny_checkpoint), reuse=Reuse(2), **where) as engine:
        made = engine(IMAGE, generator=seeded(), **CALL)
    assert torch.equal(made.frames, expected.frames)
    assert made.report.shallow_evaluations == [1, 3]


def test_where_nothing_is_reused_the_video_is_the_same(tiny_checkpoint: Path) -> None:
    with opened(tiny_checkpoint) as plain, opened(tiny_checkpoint, Reuse(9, threshold=0)) as engine:
        exact = plain(IMAGE, generator=seeded(), **CALL)
        made = engine(IMAGE, generator=seeded(), **CALL)
    assert made.report.shallow_evaluations == []
    torch.testing.assert_close(made.frames, exact.frames, rtol=0, atol=1e-5)


def test_samplers_of_two_evaluations_and_several_videos_reuse_too(tiny_checkpoint: Path) -> None:
    with opened(tiny_checkpoint, Reuse(3)) as engine:
        generators = [seeded(), torch.Generator().manual_seed(7)]
        both = engine(IMAGE, num_videos_per_prompt=2, generator=generators, sampler="heun", **CALL)
        one = engine(IMAGE, generator=seeded(), sampler="heun", **CALL)
    assert both.report.shallow_evaluations == one.report.shallow_evaluations == [1, 2, 4, 5, 7, 8]
    assert both.frames.shape[0] == 2


def test_guidance_that_a_callback_turns_on_finds_no_feature_and_runs_in_full(tiny_checkpoint: Path) -> None:
    """The halves run one by one then; that of evaluation 1 has none of the other half."""

    def guide(engine: Any, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        engine._guidance_scale = 3.0 if step == 0 else engine._guidance_scale
        return tensors

    with opened(tiny_checkpoint, Reuse(3)) as engine:
        made = engine(IMAGE, max_guidance_scale=1.0, callback_on_step_end=guide, **CALL)
    assert made.report.shallow_evaluations == [2, 3]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 1}, "reuse interval: expected a whole number of at least 2, got 1"),
        ({"interval": 2, "branch": -1}, "reuse branch: expected a whole number of at least 0"),
        ({"interval": 2, "threshold": -0.1}, "reuse threshold: expected 0.0 or more"),
        ({"interval": 2, "threshold": float("nan")}, "reuse threshold: expected a finite number"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Reuse(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"reuse": 2},
            r"reuse: expected None, or an svd_engine.Reuse, got 2. Pass svd_engine.Reuse\(interval",
        ),
        ({"reuse": Reuse(2, branch=3)}, "reuse branch: expected 0 to 2 for this checkpoint, got 3"),
    ],
)
def test_what_a_checkpoint_cannot_reuse(
    tiny_checkpoint: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        VideoEngine.from_checkpoint(str(tiny_checkpoint), backend="eager", device="cpu", **arguments)


# The command


def test_the_command_reuses_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--checkpoint", tiny_checkpoint, "--device", "cpu", "--frames", FRAMES, "--steps", 4)
    size = ("--height", HEIGHT, "--width", WIDTH, "--reuse", 4, "--reuse-branch", 1)
    assert call(main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.png", *arguments, *size) == 0
    assert (
        "reuse: 3 of 4 evaluations ran the shallow denoiser only, which is lossy" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--checkpoint", "c", "--reuse-branch", "1"), "belong to --reuse N"),
        (("--checkpoint", "c", "--reuse-threshold", "1"), "belong to --reuse N"),
        (("--checkpoint", "c", "--reuse", "1"), "reuse interval: expected a whole number of at least 2"),
    ],
)
def test_the_command_refuses(
    arguments: tuple[str, ...], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(main, "generate", PHOTOGRAPH, "-o", tmp_path / "v.png", *arguments) == 2
    assert part in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
