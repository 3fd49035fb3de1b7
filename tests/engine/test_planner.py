"""The memory planner: what it counts, what it chooses, what it refuses, and that the peak stays below."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from svd_engine import VideoEngine, host_memory
from svd_engine.bundle.costs import GraphCosts, PlanCosts
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import open_checkpoint, random_checkpoint
from svd_engine.cli.main import main
from svd_engine.errors import BackendUnavailable, OutOfMemory, SettingsError
from svd_engine.host_memory import total_bytes
from svd_engine.networks.counting import Counts, TorchCosts
from svd_engine.networks.denoiser import Denoiser, guided
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.report import size
from svd_engine.request import Settings
from svd_engine.residency import budget as budgets
from svd_engine.residency import planner as planners
from svd_engine.residency.budget import Budget, budget_of
from svd_engine.residency.contract import Residency
from svd_engine.residency.offloaded import Offloaded
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import SLICES, Planner, checkpoint_profiles, lesser_calls
from svd_engine.residency.planning import over_two_devices, planner_of_bundle, planner_of_checkpoint
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.residency.weight_streaming import WeightStreaming
from svd_engine.spec.cost import NetworkCost
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import FLOAT32, Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, Reuse
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support.commands import call
from tests.support.paths import PHOTOGRAPH

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = 2**60
MIB, GIB = 2**20, 2**30


def asked(**other: Any) -> Settings:
    return Settings(**{"frames": 5, "height": HEIGHT, "width": WIDTH, "steps": 1, **other})


# The budget


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        ("8GiB", 8 * GIB), ("8 gib", 8 * GIB), ("8GB", 8 * 10**9), ("1.5MiB", 3 * MIB // 2),
        ("700KB", 700_000),
        (12345, 12345), (1, 1), ("0.9", 900), (0.25, 250), ("1", 1000), (1.0, 1000),
    ],
)  # fmt: skip
def test_an_amount_of_memory(monkeypatch: pytest.MonkeyPatch, memory: Any, expected: int) -> None:
    monkeypatch.setattr(budgets, "_total", lambda device: 1000)
    assert budget_of(memory, CPU).bytes == expected


@pytest.mark.parametrize(
    "memory",
    ["8", "eight", "0", 0, -1, 1.5, "-1GiB", "8 GiBs", "0GiB", "9" * 400 + "GiB", True, [], ""],
)
def test_no_amount_of_memory(memory: Any, tmp_path: Path) -> None:
    message = '^memory: expected an amount such as "8GiB"'
    with pytest.raises(SettingsError, match=message):
        budget_of(memory, CPU)
    with pytest.raises(SettingsError, match=message):
        VideoEngine.from_checkpoint(tmp_path, device="cpu", memory=memory)
    with pytest.raises(SettingsError, match=message):
        VideoEngine.from_bundle(tmp_path, device="cpu", memory=memory)


def test_automatic_is_what_is_free_and_what_this_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GIB, 8 * GIB))
    card = SimpleNamespace(is_integrated=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert budget_of("auto", CUDA).bytes == int(0.9 * 6 * GIB) + budgets.CUDA_RUNTIME_BYTES
    assert budget_of("auto", CUDA).there == 8 * GIB
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)  # kept for reuse, in part
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    beside = budgets.CUDA_RUNTIME_BYTES + GIB  # what other engines of the process hold counts as its own
    assert budget_of("auto", CUDA).bytes == int(0.9 * 8 * GIB) + beside
    assert budget_of("0.5", CUDA) == Budget(4 * GIB)
    total = total_bytes()
    assert psutil.Process().memory_info().rss < budget_of("auto", CPU).bytes <= total
    assert budget_of("1", CPU) == Budget(total)
    assert budget_of("auto", CPU).there == total + psutil.swap_memory().total
    card.is_integrated = True  # its memory is the host's
    monkeypatch.setattr(budgets, "free_bytes", lambda: 10 * GIB)
    assert budget_of("auto", CUDA).bytes == 9 * GIB + beside
    monkeypatch.setattr(sys, "platform", "win32")  # a full GPU is lent host memory
    assert budget_of("auto", CUDA).there == 8 * GIB + total


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_limits_memory(version: int, tmp_path: Path) -> None:
    """The group of a container, and one around it: what is free is what files keep, too."""
    root = tmp_path / "memory" if version == 1 else tmp_path
    inner = root / "outer/inner"
    inner.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    if version == 2:
        names = ("memory.max", "memory.current", "inactive_file")
    for folder, limit, used in ((inner, "max", 400), (inner.parent, "1000", 700)):
        (folder / names[0]).write_text(limit + "\n")
        (folder / names[1]).write_text(f"{used}\n")
    (inner.parent / "memory.stat").write_text(f"anon 5\n{names[2]} 100\nother_{names[2]} 7\n")
    process = tmp_path / "cgroup"
    process.write_text("3:cpu:/\n" + ("4:memory,x:" if version == 1 else "0::") + "/outer/inner\n")
    assert host_memory.limits(tmp_path, process) == [host_memory.Limit(1000, 400)]
    process.write_text(process.read_text().replace("/outer/inner", "/not/here"))
    assert host_memory.limits(tmp_path, process) == []
    assert host_memory.limits(tmp_path, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("process", "limit", "expected"),
    [
        ("0::/", b"1000", [host_memory.Limit(1000, 300)]),
        ("no group\n\n0::/", b"1000", [host_memory.Limit(1000, 300)]),
        ("0::/", b"-1", []),
        ("0::/", b"0", []),
        ("0::/", b"\xff", []),
        ("0::/", b"", []),
    ],
)
def test_odd_files_of_a_control_group_set_no_limit(
    tmp_path: Path, process: str, limit: bytes, expected: list[host_memory.Limit]
) -> None:
    files = {"memory.max": limit, "memory.current": b"700", "memory.stat": b"\xff\ninactive_file 100\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cgroup").write_text(process)
    assert host_memory.limits(tmp_path, tmp_path / "cgroup") == expected


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_memory, "limits", lambda: [host_memory.Limit(2000, 5), host_memory.Limit(1000, 70)]
    )
    assert (host_memory.total_bytes(), host_memory.free_bytes()) == (1000, 5)


# What is counted


@pytest.fixture(scope="module")
def costs(tiny_checkpoint: Path) -> TorchCosts:
    return TorchCosts(open_checkpoint(str(tiny_checkpoint)), "cpu", (), rewrites_for("eager", "cpu"))


@pytest.fixture(scope="module")
def modules(tiny_checkpoint: Path) -> Modules:
    return Modules(open_checkpoint(str(tiny_checkpoint)), (), rewrites_for("eager", "cpu"))


def tiny_specs(modules: Modules, slice_frames: int | None = None, **other: Any) -> list[NetworkSpec]:
    profile = Profile(**{"frames": 5, "height": HEIGHT, "width": WIDTH, "decode_chunk": 5, **other})
    return specs_of(profile, modules.checkpoint.model.architecture, FLOAT32, slice_frames)


@pytest.mark.parametrize("index", range(4))
def test_counted_without_data_is_what_runs_with_it(costs: TorchCosts, modules: Modules, index: int) -> None:
    spec = tiny_specs(modules)[index]
    module = modules.network(spec)
    inputs = example_inputs(spec, modules.checkpoint.model.architecture.conditioning)
    counts = Counts(module)
    with torch.no_grad(), counts:
        held = module(**inputs)
    given = sum(tensor.nbytes for tensor in inputs.values())  # were there before
    assert (
        0.95 <= costs(spec).activation_bytes / (counts.peak + given) <= 1.4
    )  # convolutions' order of pixels
    del held


@pytest.mark.parametrize("slice_frames", [1, 2, 5])
def test_a_streamed_decoder_is_counted_on_fewer_frames(
    costs: TorchCosts, modules: Modules, slice_frames: int
) -> None:
    *_, spec = tiny_specs(modules, slice_frames, frames=14, decode_chunk=14)
    module = modules.network(spec)
    counts = Counts(module)
    with torch.no_grad(), counts:
        held = module(**example_inputs(spec))
    assert 0.95 <= costs(spec).activation_bytes / counts.peak <= 1.4
    del held


def test_on_a_cpu_loading_counts(costs: TorchCosts, modules: Modules) -> None:
    """The checkpoint's weights are there before rewrites drop and replace some of them."""
    spec = tiny_specs(modules)[2]
    whole = modules.checkpoint.load("unet", torch.float32)
    assert costs(spec).loading_bytes == sum(t.nbytes for t in (*whole.parameters(), *whole.buffers()))

    def cost_of(_spec: NetworkSpec) -> NetworkCost:
        return NetworkCost({_spec.network: 900}, 10, loading_bytes=1000)

    loading = replace(planner(0), cost_of=cost_of).considered(asked(), 1)
    running = replace(planner(0), cost_of=lambda s: replace(cost_of(s), loading_bytes=0)).considered(
        asked(), 1
    )
    for one, other in zip(loading, running, strict=True):
        assert one.stages[0].peak_bytes - other.stages[0].peak_bytes == 1200 - 900 - 11


def test_weights_that_networks_share_count_once(costs: TorchCosts, modules: Modules) -> None:
    specs = tiny_specs(modules)
    expected = 0
    for component in ("image_encoder", "vae", "unet"):
        module = modules._component(component, "float32")  # type: ignore[arg-type]
        expected += sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    held = Resident.held_weights([costs(spec) for spec in specs], costs(specs[0]), room=0)
    assert sum(held.values()) == expected


def test_on_a_gpu_a_streamed_decoder_parks_in_host_memory(tiny_checkpoint: Path, modules: Modules) -> None:
    costs = TorchCosts(open_checkpoint(str(tiny_checkpoint)), "cuda", (), rewrites_for("eager", "cuda"))
    *_, whole = tiny_specs(modules, frames=25, decode_chunk=25)
    *_, streamed = tiny_specs(modules, 1, frames=25, decode_chunk=25)
    frame = 32 * HEIGHT * WIDTH * 4  # the largest layer: 32 channels of all pixels, float32
    assert costs(streamed).parked_bytes == pytest.approx(25 * frame, rel=0.1)
    assert costs(streamed).activation_bytes < costs(whole).activation_bytes / 4
    assert costs(streamed).moved_bytes > costs(streamed).parked_bytes
    assert costs(whole).parked_bytes == costs(whole).moved_bytes == 0
    assert set(costs(whole).weights) == {"vae_decoder"}


# What is chosen: arithmetic, on costs that are made up


def made_up(seed: int) -> Any:
    """Costs that grow with shapes: the halves of guidance, a batch, a slice take what they should."""
    draw = random.Random(seed)
    weights = {
        name: draw.randint(1, 50) * MIB
        for name in ("image_encoder", "vae_encoder", "denoiser", "vae_decoder")
    }
    each = {name: draw.randint(10, 10_000) for name in weights}

    def cost_of(spec: NetworkSpec) -> NetworkCost:
        values = sum(t.shape[0] * t.shape[-1] * t.shape[-2] for t in spec.outputs if len(t.shape) > 3)
        if spec.network == "denoiser":
            batch, frames, _, h, w = spec.outputs[0].shape
            values = batch * frames * h * w * (2 if spec.guidance == "batched" else 1)
        work = values * each[spec.network]
        if isinstance(spec, StreamedSpec):
            held = work * (spec.slice_frames + 2) // (spec.outputs[0].shape[0] + 2)
            return NetworkCost({spec.network: weights[spec.network]}, held, work // 10, work, 110 * work)
        least = weights[spec.network] // 9 if spec.network in ("denoiser", "image_encoder") else None
        return NetworkCost(
            {spec.network: weights[spec.network]}, work, operations=100 * work, least_weight_bytes=least
        )

    return cost_of


RESIDENCIES = (Resident, Swapped)
STREAMING = (*RESIDENCIES, WeightStreaming)


def planner(
    budget: int,
    seed: int = 0,
    device: torch.device = CUDA,
    residencies: Sequence[type[Residency]] = RESIDENCIES,
) -> Planner:
    return Planner(
        Budget(budget), device, Architecture(), FLOAT32, made_up(seed), checkpoint_profiles,
        residencies, slices=SLICES, lesser=lambda s: lesser_calls(s, 8),
    )  # fmt: skip


CALLS: Sequence[tuple[dict[str, Any], int]] = [
    ({}, 1), ({"frames": 25}, 1), ({"frames": 1}, 1), ({"max_guidance_scale": 1.0}, 1), ({"frames": 14}, 3),
    ({"decoding": "whole"}, 1), ({"decoding": "streamed"}, 2), ({"decode_chunk_size": 2}, 1),
    ({"decoding": "streamed", "decode_chunk_size": 3}, 1), ({"height": 128, "width": 256}, 2),
]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize(("call_", "videos"), CALLS)
def test_more_memory_never_gives_a_slower_plan(
    call_: Mapping[str, Any], videos: int, device: torch.device, seed: int
) -> None:
    settings = asked(**call_)
    plans = planner(ALL, seed, device).considered(settings, videos)
    assert len(plans) == len({(p.profile, p.slice_frames, p.residency) for p in plans})
    last = None
    for budget in sorted({plan.peak_bytes for plan in plans}):
        chosen = planner(budget + (100 * MIB if device == CPU else 0), seed, device).choose(settings, videos)
        assert last is None or chosen.cost <= last
        last = chosen.cost
    assert last == min(plan.cost for plan in plans)


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize(("call_", "videos"), CALLS[:4])
def test_weights_that_stream_fill_the_budget(call_: Mapping[str, Any], videos: int, seed: int) -> None:
    """More memory leaves more weights where they are, until none stream: then it is as swapped."""
    settings = asked(steps=seed + 1, **call_)
    small = planner(0, seed, residencies=STREAMING)
    least = min(plan.peak_bytes for plan in small.considered(settings, videos))
    most = max(plan.peak_bytes for plan in planner(ALL, seed).considered(settings, videos))
    last = None
    for budget in range(least, most + 1, max(1, (most - least) // 12)):
        limited = planner(budget, seed, residencies=STREAMING)
        chosen = limited.choose(settings, videos)
        assert chosen.peak_bytes <= budget
        assert last is None or chosen.cost <= last
        last = chosen.cost
        assert all(p.streamed_bytes for p in limited.considered(settings, videos) if p.residency.streams)
    everything = planner(most, seed, residencies=STREAMING)
    assert everything.considered(settings, videos) == planner(most, seed).considered(settings, videos)
    with pytest.raises(SettingsError, match=r"^memory: expected") as caught:
        planner(least - 1, seed, residencies=STREAMING).choose(settings, videos)
    amount = re.search(r'memory="(\S+?)"', caught.value.remedy)
    assert amount
    planner(budget_of(amount[1], CUDA).bytes, seed, residencies=STREAMING).choose(settings, videos)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("call_", "videos"), CALLS)
def test_a_refusal_names_what_the_planner_accepts(call_: Mapping[str, Any], videos: int, seed: int) -> None:
    settings = asked(**call_)
    smallest = min(plan.peak_bytes for plan in planner(ALL, seed).considered(settings, videos))
    small = planner(smallest - 1, seed)
    with pytest.raises(SettingsError, match=r"^memory: expected .* or more for") as caught:
        small.choose(settings, videos)
    amount = re.search(r'memory="(\S+?)"', caught.value.remedy)
    assert amount
    planner(budget_of(amount[1], CUDA).bytes, seed).choose(settings, videos)
    for name, field in (("num_frames", "frames"), ("decoding", "decoding")):
        for value in re.findall(rf'{name}="?(\w+)', caught.value.remedy):
            given = {field: int(value) if value.isdecimal() else value}
            size = {"decode_chunk_size": None} if field == "decoding" else {}
            assert small.choose(replace(settings, **given, **size), videos).peak_bytes < smallest
    for height, width in re.findall(r"height=(\d+), width=(\d+)", caught.value.remedy):
        small.choose(replace(settings, height=int(height), width=int(width)), videos)


def test_where_the_weights_do_not_fit_no_lesser_call_is_counted() -> None:
    """A refusal that can name none need not take its time."""
    costs, counted = made_up(0), set()

    def cost_of(spec: NetworkSpec) -> NetworkCost:
        counted.add(spec.outputs[0].shape[1] if spec.network == "denoiser" else 5)
        return costs(spec)

    small = replace(planner(budgets.CUDA_RUNTIME_BYTES + MIB), cost_of=cost_of)
    with pytest.raises(SettingsError, match=r"^memory: expected .* or more for 5 frames") as caught:
        small.choose(asked(), 1)
    assert counted == {5}
    assert re.fullmatch(r'Pass memory="[\d.]+[MG]iB"\.', caught.value.remedy)


def test_what_was_asked_for_is_kept() -> None:
    everything = planner(0)
    slices = lambda **other: {p.slice_frames for p in everything.considered(asked(frames=25, **other), 1)}  # noqa: E731
    assert slices() == {None, 8, 4, 2, 1}
    assert slices(decoding="whole") == {None}
    assert slices(decode_chunk_size=4) == {None}
    assert slices(decoding="streamed") == {8, 4, 2, 1}
    assert slices(decoding="streamed", decode_chunk_size=3) == {3}
    assert slices(decoding="streamed", decode_chunk_size=99) == {25}
    chunks = everything.considered(asked(decode_chunk_size=2), 1)
    assert {plan.profile.decode_chunk for plan in chunks} == {2}
    assert {plan.residency for plan in planner(0, residencies=(Swapped,)).considered(asked(), 1)} == {Swapped}
    unguided = everything.considered(asked(max_guidance_scale=1), 1)
    assert {plan.profile.guidance for plan in unguided} == {"single"}


def test_the_words_of_a_refusal() -> None:
    with pytest.raises(SettingsError) as caught:
        planner(GIB // 2).choose(asked(decode_chunk_size=5), 1)
    assert re.fullmatch(
        r"memory: expected [\d.]+ [MG]iB or more for 5 frames of 32x48 "
        r"\(networks swapped, (single|batched) guidance, batch 1, decoder whole: "
        r"at most [\d.]+ [MG]iB, in \S+\), got 0.5 GiB",
        caught.value.problem,
    )
    assert re.fullmatch(r'Pass memory="[\d.]+[MG]iB".*\.', caught.value.remedy)


# The engine


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[VideoEngine]:
    with VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu", memory=ALL) as opened:
        yield opened


def video(engine: VideoEngine, **other: Any) -> Any:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    given = {"sigmas": [1.0, 0.0], "num_frames": 3, "num_videos_per_prompt": 2, **other}
    return engine(
        image, HEIGHT, WIDTH, output_type="pt", generator=torch.Generator().manual_seed(0), **given
    )  # fmt: skip


def differences(one: Plan, other: Plan) -> int:
    pairs = (
        (one.residency, other.residency), (one.slice_frames, other.slice_frames),
        (one.profile.guidance, other.profile.guidance), (one.profile.batch, other.profile.batch),
    )  # fmt: skip
    return sum(a != b for a, b in pairs)


def test_every_choice_of_a_plan_makes_the_same_video(engine: VideoEngine) -> None:
    assert engine.source.planner is not None
    plans = engine.source.planner.considered(asked(frames=3, videos_per_image=2), 2)
    assert len(plans) == 2 * 2 * 2 * 3
    expected = video(engine)
    assert expected.report.plan.residency == "resident"
    assert expected.report.plan.decoding == "whole"
    own = engine.source
    for plan in (*(plan for plan in plans if differences(plan, plans[0]) == 1), plans[-1]):
        forced: Any = SimpleNamespace(
            choose=lambda settings, videos, plan=plan: plan, fits=lambda plan: True, budget=Budget(ALL),
            report=own.planner.report, in_words=own.planner.in_words, keep=lambda plan: None, second=None,
        )  # fmt: skip
        engine.source = replace(own, planner=forced)
        result = video(engine)
        same_denoiser = str(plan.profile) == expected.report.profile  # a call of other rows rounds otherwise
        tolerance = 1e-6 if same_denoiser else 4e-6
        assert (result.frames - expected.frames).abs().max() <= tolerance, str(plan)
        assert result.report.plan == plan.report(ALL)
        assert result.report.swap_networks is (plan.residency is Swapped)
        assert ("streamed" in result.report.stages["vae_decoder"].detail) is (plan.slice_frames is not None)
    engine.source = own


@torch.no_grad()
def test_guidance_modes_and_batches_differ_by_rounding_alone(tiny_checkpoint: Path) -> None:
    """In float64 one run of two videos and both halves gives what a run of each does.

    So what they differ by in float32 is that kernels of other rows add up in another order.
    """
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    unet, architecture = checkpoint.load("unet", torch.float64), checkpoint.model.architecture
    denoiser = Denoiser(unet)
    spec = specs_of(Profile(3, HEIGHT, WIDTH, batch=2), architecture, FLOAT32)[2]
    given = {name: t.double() for name, t in example_inputs(spec, architecture.conditioning).items()}
    scales = given.pop("guidance")

    def v_of(*told: Tensor) -> Tensor:
        made: Tensor = unet(**denoiser.unet_inputs(*told), return_dict=False)[0]
        return made

    together = guided(v_of(*denoiser.both_halves(**given)), scales)
    for row in range(2):
        one = {name: t[row : row + 1] if t.dim() else t for name, t in given.items()}
        nothing = {name: torch.zeros_like(one[name]) for name in ("first_latent", "embedding")}
        halves = torch.cat([v_of(*(one | nothing).values()), v_of(*one.values())])
        apart = guided(halves, scales[row : row + 1])
        assert (together[row : row + 1] - apart).abs().max() <= 1e-12 * together.abs().max()


def test_the_plan_is_said(engine: VideoEngine, notices: pytest.LogCaptureFixture) -> None:
    report = video(engine).report
    (line,) = notices.messages
    assert re.fullmatch(
        r"networks resident, batched guidance, batch [12], decoder whole: at most .* of 1,073,741,824.0 GiB",
        line,
    )
    assert report.plan.stages[0].network.startswith("image_encoder-b")
    assert report.plan.peak_bytes == max(stage.peak_bytes for stage in report.plan.stages)
    assert json.loads(report.model_dump_json())["plan"]["budget_bytes"] == ALL


def test_without_a_budget_nothing_is_planned(tiny_checkpoint: Path) -> None:
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", memory=None) as engine:
        assert engine.source.planner is None
        assert video(engine).report.plan is None


# What is automatic


def automatic(budget: int, there: int, seed: int = 0, ceiling: int | None = None) -> Planner:
    known = None if ceiling is None else (lambda _settings, _videos: ceiling)
    return replace(planner(0, seed), budget=Budget(budget, there), ceiling=known)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("call_", "videos"), CALLS)
def test_where_it_fits_a_call_runs_as_without_a_budget(
    call_: Mapping[str, Any], videos: int, seed: int
) -> None:
    settings = asked(**call_)
    usual = automatic(0, ALL, seed).usual(settings, videos)
    assert usual.profile == Profile.of_request(settings, videos)
    assert (usual.slice_frames, usual.residency) == (settings.slice_frames, Resident)
    assert automatic(usual.peak_bytes, ALL, seed).choose(settings, videos) == usual
    less = usual.peak_bytes - 1
    if any(p.peak_bytes <= less for p in planner(0, seed).considered(settings, videos)):
        assert automatic(less, ALL, seed).choose(settings, videos) == planner(less, seed).choose(
            settings, videos
        )


@pytest.mark.parametrize("seed", range(4))
def test_what_fits_in_no_way_is_tried_in_the_smallest_unless_there_is_surely_less(seed: int) -> None:
    settings = asked(frames=25)
    plans = planner(0, seed).considered(settings, 1)
    smallest = min(plans, key=lambda plan: plan.peak_bytes)
    assert smallest.sure_bytes < smallest.peak_bytes
    assert automatic(0, smallest.sure_bytes, seed).choose(settings, 1) == smallest
    there = smallest.sure_bytes - 1
    with pytest.raises(SettingsError, match=r"^memory: expected .* or more for .*, got .* in all") as caught:
        automatic(there, there, seed).choose(settings, 1)
    assert caught.value.remedy.startswith("Use a device of ")
    for frames in re.findall(r"num_frames=(\d+)", caught.value.remedy):
        automatic(there, there, seed).choose(replace(settings, frames=int(frames)), 1)


def test_where_memory_is_ample_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = budgets.CUDA_RUNTIME_BYTES
    counted = []
    known = replace(automatic(runtime + 100, ALL, ceiling=100), cost_of=lambda spec: counted.append(spec))
    chosen = known.choose(asked(frames=14), 2)
    assert counted == []
    assert chosen == Plan(Profile.of_request(asked(frames=14), 2), None, Resident)
    with pytest.raises(AttributeError):  # it is counted
        replace(known, budget=Budget(runtime + 99, ALL)).choose(asked(frames=14), 2)


def test_loaded_networks_do_not_count_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has grown by them when the second call comes."""
    taken = [100, 10**9]
    monkeypatch.setattr(planners, "used_by_runtime", lambda device: taken.pop(0))
    known = automatic(200, ALL, ceiling=100)
    first = known.choose(asked(), 1)
    assert first.stages == ()
    assert known.choose(asked(), 1) == first


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("frames", "height", "width", "videos"), [(1, 64, 64, 1), (8, 128, 192, 3)])
def test_the_ceiling_is_above_what_is_counted(
    frames: int, height: int, width: int, videos: int, device: str
) -> None:
    precision = FLOAT32 if device == "cpu" else Precision.of("float16")
    demo = planner_of_checkpoint(
        open_checkpoint("demo"), Budget(ALL), "eager", torch.device(device), precision
    )
    settings = Settings(frames, height, width, steps=1)
    peak = demo.usual(settings, videos).peak_bytes - demo._runtime_bytes
    assert demo.ceiling is not None
    assert peak <= demo.ceiling(settings, videos) <= 3 * peak + 2**30


def test_the_ceiling_of_the_largest_networks() -> None:
    """Beside the peak of SVD-XT's 25 frames that docs/cards.md shows, counted: 39.5 GiB."""
    xt = planner_of_checkpoint(
        random_checkpoint("svd-xt"), Budget(ALL), "compiled", CUDA, Precision.of("float16")
    )
    assert xt.ceiling is not None
    assert 39.5 * GIB < xt.ceiling(Settings(25, 576, 1024), 1) < 70 * GIB


def test_automatic_is_the_default_and_changes_nothing(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    for opened in (VideoEngine.from_checkpoint, VideoEngine.from_bundle):
        folder = tiny_checkpoint if opened == VideoEngine.from_checkpoint else tiny_bundle
        with opened(folder, device="cpu") as engine, opened(folder, device="cpu", memory=None) as unplanned:
            planned = video(engine, num_frames=FRAMES)
            assert engine.source.planner is not None
            assert engine.source.planner.budget.bytes > 0  # asked when the call came
            assert planned.report.plan is None  # memory is ample: nothing was counted
            assert type(engine.residency) is Resident
            assert torch.equal(planned.frames, video(unplanned, num_frames=FRAMES).frames)


def test_an_automatic_budget_stays_while_networks_are_loaded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [8 * GIB, 100 * MIB]
    monkeypatch.setattr(budgets, "free_bytes", lambda: free.pop(0))
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu") as engine:
        video(engine)
        budget = engine.source.planner.budget  # type: ignore[union-attr]
        video(engine)
        assert engine.source.planner.budget == budget  # type: ignore[union-attr]
        engine.close()
        video(engine)
        assert engine.source.planner.budget.bytes < budget.bytes  # type: ignore[union-attr]


def test_a_call_that_may_not_fit_is_tried_and_says_so(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, notices: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budgets, "free_bytes", lambda: 0)
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu") as engine:
        assert video(engine).report.plan is not None
    assert [record.levelname for record in notices.records] == ["INFO", "WARNING"]
    assert "memory may run out" in notices.messages[1]


# Beside reuse


REUSE, FEATURE = Reuse(2, branch=0), Feature(2, 64, 1)  # of the tiny checkpoint


def reusing(device: torch.device, **other: Any) -> Planner:
    """Made-up costs: the shallow denoiser reads a tenth of the full one's weights, which it shares."""
    plain = made_up(0)

    def cost_of(spec: NetworkSpec) -> NetworkCost:
        if not spec.kept:
            return plain(spec)
        cost = plain(replace(spec, network="denoiser", outputs=spec.outputs[:1]))
        part = 10 if spec.network == "shallow_denoiser" else 1
        return replace(
            cost, operations=cost.operations // part, activation_bytes=cost.activation_bytes // part
        )

    return replace(planner(ALL, 0, device), cost_of=cost_of, reuse=REUSE, feature=FEATURE, **other)


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("guided", [True, False])
def test_what_is_reused_counts(videos: int, guided: bool) -> None:
    settings = asked(steps=5, max_guidance_scale=3.0 if guided else 1.0)
    feature = 4 * videos * (2 if guided else 1) * 5 * 64 * (HEIGHT // 8) * (WIDTH // 8)
    plain = {key(p): p for p in planner(ALL).considered(settings, videos)}
    for plan in reusing(CUDA).considered(settings, videos):
        without = plain[key(plan)]
        _, _, full, shallow, decoder = plan.stages
        assert (full.network[:5], shallow.network[:8]) == ("full_", "shallow_")
        apart = 2 if plan.profile.batch < videos else 1  # of several runs, put together
        assert full.peak_bytes == without.stages[2].peak_bytes + apart * feature
        assert shallow.held_bytes == full.held_bytes == without.stages[2].held_bytes
        assert (shallow.moved_bytes, full.moved_bytes) == (0, without.stages[2].moved_bytes)
        assert decoder == without.stages[3]
        assert plan.cost < without.cost


def key(plan: Plan) -> tuple[object, ...]:
    return plan.profile, plan.slice_frames, plan.residency


def test_denoisers_with_weights_of_their_own_are_held_together() -> None:
    """As a bundle's are: also where one network is in memory at a time."""

    def cost_of(spec: NetworkSpec) -> NetworkCost:
        return NetworkCost({spec.key: 100}, 10)

    plans = replace(reusing(CUDA), cost_of=cost_of).considered(asked(), 1)
    swapped = next(plan for plan in plans if plan.residency is Swapped)
    assert [stage.held_bytes for stage in swapped.stages] == [100, 100, 200, 200, 100]
    assert [stage.moved_bytes for stage in swapped.stages] == [200, 200, 400, 0, 200]


@pytest.mark.parametrize("index", [2, 3])
def test_full_and_shallow_are_counted_as_they_run(tiny_checkpoint: Path, index: int) -> None:
    checkpoint = open_checkpoint(str(tiny_checkpoint))
    rewrites = rewrites_for("eager", "cpu")
    modules, costs = Modules(checkpoint, (), rewrites), TorchCosts(checkpoint, "cpu", (), rewrites)
    profile = Profile(5, HEIGHT, WIDTH, decode_chunk=5)
    architecture = checkpoint.model.architecture
    spec = specs_of(profile, architecture, FLOAT32, feature=FEATURE)[index]
    module, inputs = modules.network(spec), example_inputs(spec, architecture.conditioning)
    counts = Counts(module)
    with torch.no_grad(), counts:
        held = module(**inputs)
    given = sum(tensor.nbytes for tensor in inputs.values())
    assert 0.95 <= costs(spec).activation_bytes / (counts.peak + given) <= 1.4
    del held


def limited(engine: VideoEngine, **changes: Any) -> None:
    engine.source = replace(engine.source, planner=replace(engine.source.planner, **changes))  # type: ignore[type-var]


ONE_VIDEO: dict[str, Any] = {"num_videos_per_prompt": 1, "decoding": "whole"}


def test_a_call_that_reuses_is_planned(tiny_checkpoint: Path) -> None:
    call_: dict[str, Any] = {**ONE_VIDEO, "sigmas": [10.0, 1.0, 0.0]}
    of: dict[str, Any] = {"backend": "eager", "device": "cpu", "reuse": Reuse(2)}
    settings = asked(frames=3, decoding="whole", sigmas=(10.0, 1.0, 0.0))
    auto = VideoEngine.from_checkpoint(tiny_checkpoint, **of).source.planned_anew().planner
    assert auto is not None
    assert auto.choose(settings, 1).stages == ()  # memory is ample
    with VideoEngine.from_checkpoint(tiny_checkpoint, memory=ALL, **of) as engine:
        resident = video(engine, **call_)
        assert [s.network.split("_")[0] for s in resident.report.plan.stages[2:4]] == ["full", "shallow"]
        limited(engine, residencies=(Swapped,))
        swapped = video(engine, **call_)
        assert swapped.report.plan.residency == "swapped"
        assert swapped.report.shallow_evaluations == resident.report.shallow_evaluations == [1]
        assert torch.equal(swapped.frames, resident.frames)
        limited(engine, budget=Budget(MIB))
        with pytest.raises(SettingsError, match=r"^memory: expected .* or more for 3 frames"):
            video(engine, **call_)


def test_the_ceiling_counts_what_is_reused() -> None:
    for device in (CPU, CUDA):
        plain = replace(automatic(0, ALL, ceiling=10**6), device=device)
        known = reusing(device, budget=Budget(10**6 + plain._runtime_bytes, ALL), ceiling=plain.ceiling)
        assert replace(known, feature=None, reuse=None)._ample(asked(), 1) is not None
        assert known._ample(asked(), 1) is None


# On two devices


ONE, OTHER = torch.device("cuda:0"), torch.device("cuda:1")


def two(budget: int, other: int, seed: int = 0, there: int | None = None) -> Planner:
    """Made-up costs; in blocks a denoiser takes a tenth of its weights."""
    plain = made_up(seed)

    def cost_of(spec: NetworkSpec) -> NetworkCost:
        cost = plain(spec)
        least = cost.weight_bytes // 10 if spec.network == "denoiser" else None
        return replace(cost, least_weight_bytes=least)

    first = replace(
        planner(budget, seed, ONE), cost_of=cost_of, residencies=(Resident, Swapped, Offloaded),
        budget=Budget(budget, there),
    )  # fmt: skip
    return over_two_devices(first, replace(first, device=OTHER, budget=Budget(other, there)))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("call_", "videos"), CALLS)
def test_each_of_two_devices_has_a_plan(call_: Mapping[str, Any], videos: int, seed: int) -> None:
    """The same denoiser on both, and nothing else on the second; a refusal names what is enough for both."""
    settings = asked(**call_)
    ample = two(ALL, ALL, seed)
    for plan in ample.considered(settings, videos):
        half = plan.other_half
        assert half is not None
        assert plan.profile == half.profile
        assert plan.profile.guidance == "single"
        (stage,) = half.stages
        assert stage.network == plan.stages[2].network
        assert half.residency is Resident
        assert half.peak_bytes <= max(plan.stages[2].peak_bytes, half.peak_bytes)
    least = min(plan.peak_bytes for plan in ample.considered(settings, videos))
    small = two(least - 1, least - 1, seed)
    with pytest.raises(SettingsError, match=r"^memory: expected .* or more for") as caught:
        small.choose(settings, videos)
    amount = re.search(r'memory="(\S+?)"', caught.value.remedy)
    assert amount
    enough = budget_of(amount[1], CUDA).bytes
    chosen = two(enough, enough, seed).choose(settings, videos)
    assert chosen.other_half is not None
    assert max(chosen.peak_bytes, chosen.other_half.peak_bytes) <= enough


def test_a_smaller_second_device() -> None:
    """Its denoiser comes in blocks where that fits alone; what fits in no way is said of that device."""
    settings = asked(frames=5)
    half = two(ALL, ALL).choose(settings, 1).other_half
    assert half is not None
    chosen = two(ALL, half.peak_bytes - 1).choose(settings, 1)
    assert chosen.other_half is not None
    assert (chosen.residency, chosen.other_half.residency) == (Resident, Offloaded)
    with pytest.raises(SettingsError, match=r"^memory of cuda:1: expected .* or more for 5 frames"):
        two(ALL, 1).choose(settings, 1)
    with pytest.raises(SettingsError, match=r"^memory: expected"):
        two(1, 1).choose(settings, 1)
    report = two(ALL, half.peak_bytes).report(two(ALL, half.peak_bytes).choose(settings, 1))
    assert report.other_half is not None
    assert (report.budget_bytes, report.other_half.budget_bytes) == (ALL, half.peak_bytes)


def test_two_devices_within_what_is_free() -> None:
    settings = asked(frames=5)
    half = two(ALL, ALL).choose(settings, 1).other_half
    assert half is not None
    tried = two(ALL, 1, there=ALL).choose(settings, 1)  # fits in no way, and not surely not
    assert tried.other_half is not None
    assert not two(ALL, 1, there=ALL).fits(tried)
    known = replace(two(ALL, ALL, there=ALL), ceiling=lambda _settings, _videos: 100)
    assert known.second is not None
    for second in (replace(known.second, ceiling=known.ceiling), known.second):
        chosen = replace(known, second=second).choose(settings, 1)
        assert (chosen.stages == ()) is (second.ceiling is not None)
        assert chosen.other_half is not None
    anew = known.anew(lambda device: Budget(1 if device == OTHER else 2))
    assert anew.second is not None
    assert (anew.budget.bytes, anew.second.budget.bytes) == (2, 1)


def test_two_devices_that_are_one_memory(tiny_checkpoint: Path) -> None:
    """The CPU twice: both denoisers count."""
    settings = asked(frames=3)
    first = planner_of_checkpoint(open_checkpoint(str(tiny_checkpoint)), Budget(ALL), "eager", CPU, FLOAT32)
    one = next(p for p in first.considered(settings, 1) if p.profile.guidance == "single")
    both = over_two_devices(first, first).considered(settings, 1)[0]
    weights = first.cost_of(specs_of(one.profile, first.architecture, FLOAT32)[2])
    assert [b.held_bytes - a.held_bytes for a, b in zip(one.stages, both.stages, strict=True)] == [
        weights.weight_bytes
    ] * 4
    assert both.stages[2].peak_bytes >= one.stages[2].peak_bytes + weights.activation_bytes
    assert both.other_half is None


def test_an_engine_on_two_devices_is_planned(
    tiny_checkpoint: Path,
    costs: TorchCosts,
    monkeypatch: pytest.MonkeyPatch,
    notices: pytest.LogCaptureFixture,
) -> None:
    """The CPU twice; then planned as if each had a memory of its own."""
    on: dict[str, Any] = {"backend": "eager", "devices": ["cpu", "cpu"]}
    with VideoEngine.from_checkpoint(tiny_checkpoint, memory=ALL, **on) as engine:
        limited(engine, cost_of=costs)
        resident = video(engine, **ONE_VIDEO)
        assert resident.report.plan.guidance == "single"
        limited(engine, residencies=(Swapped,), both_halves=False)
        limited(engine, second=replace(engine.source.planner, denoiser_alone=True))  # type: ignore[type-var]
        swapped = video(engine, **ONE_VIDEO)
        assert {type(engine.residency), type(engine.other_half)} == {Swapped}
        assert torch.equal(swapped.frames, resident.frames)
        other_half = swapped.report.plan.other_half
        assert (other_half.residency, len(other_half.stages)) == ("swapped", 1)
        last = notices.messages[-1]
        assert last.startswith("the other half of guidance on cpu: networks swapped, at most ")
        network = next(iter(engine.other_half._networks.values()))  # type: ignore[union-attr]
        monkeypatch.setattr(network, "run_in_parts", lambda inputs, on_part: torch.empty(2**55))
        with pytest.raises(OutOfMemory, match=f"room for the planned {size(other_half.peak_bytes)}"):
            video(engine, **ONE_VIDEO)
        limited(engine, budget=Budget(MIB))
        with pytest.raises(SettingsError, match=r"^memory: expected"):
            video(engine, **ONE_VIDEO)


def test_a_call_that_does_not_fit_is_refused_before_anything_is_opened(tiny_checkpoint: Path) -> None:
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", memory="1MiB") as engine:
        with pytest.raises(SettingsError, match=r"^memory: expected .* got 1.0 MiB"):
            video(engine)
        assert not engine.residency._networks


def test_networks_swapped_on_the_cpu_are_forgotten(tiny_checkpoint: Path) -> None:
    with VideoEngine.from_checkpoint(tiny_checkpoint, device="cpu", swap_networks=True, memory=ALL) as engine:
        report = video(engine).report
        assert report.plan.residency == "swapped"
        assert {part for part, _ in engine.backend.modules._components} == {"vae"}  # type: ignore[attr-defined]


# Bundles


@pytest.fixture(scope="module")
def bundle_planner(tiny_bundle: Path) -> Planner:
    return planner_of_bundle(Bundle(tiny_bundle), Budget(ALL), "onnxruntime", CPU)


def test_a_bundle_is_planned_over_profiles_of_the_same_video(bundle_planner: Planner) -> None:
    settings = asked(frames=FRAMES)
    plans = bundle_planner.considered(settings, 1)
    assert [(p.residency, p.profile.guidance, p.slice_frames) for p in plans] == [
        (Resident, "batched", None), (Swapped, "batched", None),
        (Resident, "single", None), (Swapped, "single", None),
    ]  # fmt: skip
    assert {plan.profile.decode_chunk for plan in plans} == {CHUNK}
    assert bundle_planner.choose(settings, 1) == plans[0]
    assert all(stage.source == "counted" for stage in plans[0].stages)
    small = replace(bundle_planner, budget=Budget(min(p.peak_bytes for p in plans) - 1))
    with pytest.raises(SettingsError, match="decoder chunks of 2"):
        small.choose(settings, 1)


def test_a_bundle_s_lesser_calls_are_decoded_as_was_asked(bundle_planner: Planner) -> None:
    """All frames at once, where it has no profile that does: no chunks instead."""
    assert [s.decode_chunk_size for s in bundle_planner.lesser(asked(frames=FRAMES))] == [CHUNK, CHUNK]
    assert list(bundle_planner.lesser(asked(frames=FRAMES, decoding="whole"))) == []


def test_a_bundle_within_a_budget(tiny_bundle: Path) -> None:
    with VideoEngine.from_bundle(tiny_bundle, device="cpu", memory="0.9") as engine:
        guided = video(engine, num_frames=FRAMES)
        unguided = video(engine, num_frames=FRAMES, max_guidance_scale=1.0)
    assert guided.report.plan.guidance == "batched"
    assert unguided.report.plan.guidance == "single"
    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        assert torch.equal(video(engine, num_frames=FRAMES).frames, guided.frames)


def test_half_precision_on_the_cpu_is_widened(tiny_half_bundle: Path, tiny_bundle: Path) -> None:
    half, single = (Bundle(folder) for folder in (tiny_half_bundle, tiny_bundle))
    spec = half.manifest.networks[-1].spec
    assert GraphCosts(half, "cpu")(spec).weight_bytes == 3 * GraphCosts(half, "cuda")(spec).weight_bytes
    assert GraphCosts(single, "cpu")(single.manifest.networks[-1].spec).weight_bytes > 0


def test_what_the_compiler_said_of_plans(planned: Path, tiny_half_bundle: Path) -> None:
    bundle = Bundle(planned)
    plan = bundle.manifest.plans[0]
    costs = PlanCosts(bundle, plan.flavour)(bundle.spec(plan))
    assert costs.source == "compiled"
    assert costs.activation_bytes >= plan.device_memory_bytes
    assert costs.weight_bytes > 0
    spec = Bundle(tiny_half_bundle).manifest.networks[0].spec
    with pytest.raises(
        BackendUnavailable,
        match="expected one of tensorrt, whose compiler says what memory it takes, got none",
    ):
        PlanCosts(Bundle(tiny_half_bundle), "tensorrt")(spec)


# The commands


def test_a_plan_as_a_table(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "100GiB", "--device", "cpu", "--frames", "3", "--all")
    assert call(main, "plan", tiny_checkpoint, *options) == 0
    *rows, line = capsys.readouterr().out.splitlines()
    stages = next(i for i, row in enumerate(rows) if row.startswith("stage "))
    assert rows[0].split() == [
        "networks",
        "guidance",
        "batch",
        "decoder",
        "peak",
        "fits",
        "predicted",
        "time",
    ]
    assert rows[1].startswith("resident  batched   1      whole")
    assert rows[1].endswith("yes   1.00x")
    assert len(rows[1:stages]) == 2 * 2 * 3  # residency, guidance, decoder: whole, two frames, one
    assert [row.split("-")[0] for row in rows[stages + 1 :]] == [
        "image_encoder", "vae_encoder", "denoiser", "vae_decoder",
    ]  # fmt: skip
    assert line.endswith(" of 100.0 GiB")


def test_the_plan_of_a_call_that_reuses(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", "100GiB", "--device", "cpu", "--reuse", "2", "--decoding", "whole")
    small = ("--frames", "3", "--height", str(HEIGHT), "--width", str(WIDTH))
    assert call(main, "plan", tiny_checkpoint, *small, *options) == 0
    _, *rows, _ = capsys.readouterr().out.splitlines()
    assert [row.split("-")[0] for row in rows] == [
        "image_encoder", "vae_encoder", "full_denoiser", "shallow_denoiser", "vae_decoder",
    ]  # fmt: skip


def test_the_plan_of_two_devices(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As an engine says it: each has a peak, and GPUs need not be here."""
    options = ("--memory", "8GiB", "--devices", "cuda:0, cuda:1", "--decoding", "whole", "--all")
    small = ("--frames", "3", "--height", str(HEIGHT), "--width", str(WIDTH))
    assert call(main, "plan", tiny_checkpoint, *small, *options) == 0
    heading, *rows, first, second = capsys.readouterr().out.splitlines()
    assert "  peak  " in heading
    assert "  peak on cuda:1  " in heading
    assert [row.split()[1] for row in rows[-5:]] == ["cuda:0"] * 4 + ["cuda:1"]
    assert rows[-1].split()[0] == rows[-3].split()[0]  # the denoiser
    assert re.fullmatch(r"networks resident, single guidance, .* at most [\d.]+ [MG]iB of 8\.0 GiB", first)
    assert re.fullmatch(
        r"the other half of guidance on cuda:1: networks resident, at most [\d.]+ [MG]iB of 8\.0 GiB", second
    )


def test_the_plan_of_the_cpu_twice(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One memory, which both denoisers take."""
    held = []
    for where in (("--device", "cpu"), ("--devices", "cpu,cpu")):
        assert call(main, "plan", tiny_bundle, "--memory", "none", *where) == 0
        said = capsys.readouterr().out
        held.append(float(said.splitlines()[3].split()[2]))  # weights, while the denoiser runs
    assert held[1] > held[0]
    assert "single guidance" in said
    assert "the other half" not in said


def test_the_plan_of_what_is_free_is_counted(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "plan", tiny_bundle, "--device", "cpu") == 0
    assert "networks resident, batched guidance, batch 1, decoder chunks of 2" in capsys.readouterr().out


def test_the_plan_of_a_bundle(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "plan", tiny_bundle, "--memory", "100GiB", "--device", "cpu") == 0
    assert "decoder chunks of 2: at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--memory", "1MiB", "--device", "cpu"],
            r"^error: memory: expected .* got 1.0 MiB. Pass --memory [\d.]+[MG]iB\.",
        ),
        (["--memory", "much", "--device", "cpu"], "^error: memory: expected an amount"),
        (["--device", "tpu"], "^error: device: expected auto, cpu, cuda or cuda:N, .* got 'tpu'"),
        (
            ["--backend", "onnxruntime", "--device", "cpu"],
            "^error: backend onnxruntime on cpu: expected one of comp",
        ),
        (
            ["--device", "cuda", "--memory", "0.5"],
            '^error: memory: expected an amount such as "8GiB" where there',
        ),
        (["--device", "cuda"], '^error: memory: expected an amount such as "8GiB" where there is no GPU'),
        (["--devices", "cuda:0,cuda:1"], '^error: memory: expected an amount such as "8GiB" where there'),
        (["--devices", "cpu"], "^error: devices: expected two devices, one for each half of guidance"),
        (["--devices", "cpu,cpu", "--reuse", "2"], "^error: devices: expected no reuse beside it"),
        (["--devices", "cpu,cpu", "--device", "cpu"], "^error: devices: expected no device beside it"),
        (["--reuse", "2", "--reuse-branch", "9"], "^error: reuse branch: expected 0 to 2 for this"),
        (["--reuse-branch", "1"], "--reuse-branch belongs to --reuse N"),
    ],
)
def test_a_plan_that_cannot_be(
    tiny_checkpoint: Path, options: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(main, "plan", tiny_checkpoint, "--frames", "1", *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_generate_within_a_budget(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = ["generate", PHOTOGRAPH, "-o", tmp_path / "out.png", "--checkpoint", tiny_checkpoint]
    small = ["--device", "cpu", "--frames", "2", "--height", "32", "--width", "48", "--steps", "1"]
    report = tmp_path / "run.json"
    assert call(main, *generate, *small, "--memory", "100GiB", "--report", report) == 0
    assert "networks resident, batched guidance, batch 1, decoder whole: at most" in capsys.readouterr().err
    assert json.loads(report.read_text())["plan"]["decoding"] == "whole"
    assert call(main, *generate, *small, "--memory", "1MiB") == 2
    assert "Pass --memory " in capsys.readouterr().err


# Measured


PEAK = r"""
import re, torch
from dataclasses import replace
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import random_checkpoint
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget
from svd_engine.spec.reuse import Reuse

image = torch.rand(1, 3, 128, 192)
cost_of, fastest = None, 0
for reuse in (None, Reuse(2)):
    engine = VideoEngine.from_checkpoint(random_checkpoint("small"), device="cpu", memory="0.99", reuse=reuse)
    cost_of = cost_of or engine.source.planner.cost_of
    planner = replace(engine.source.planner, cost_of=cost_of)  # what one has counted the other need not
    call = {"decoding": "streamed", "decode_chunk_size": 1} if reuse else {}
    peaks = sorted(p.peak_bytes for p in planner.considered(Settings(8, 128, 192, steps=2, **call), 1))
    fastest = fastest or peaks[-1]
    engine.source = replace(engine.source, planner=replace(planner, budget=Budget(peaks[0] + 2**25)))
    open("/proc/self/clear_refs", "w").write("5")  # the highest begins with what there is now
    sigmas = [9.0, 1.0, 0.0] if reuse else [1.0, 0.0]
    run = engine(image, 128, 192, 8, sigmas=sigmas, output_type="pt", **call).report
    status = open("/proc/self/status").read()  # getrusage includes the process that started this one
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    print(peak, run.plan.budget_bytes, fastest, len(run.plan.stages), run.plan.decoding)
    engine.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_the_peak_of_a_process_stays_below_its_budget() -> None:
    """In a process of its own, where the fastest plan would take far more: plain, and with reuse."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=300
    )
    for line, stages in zip(done.stdout.splitlines(), ("4", "5"), strict=True):
        peak, budget, fastest, count, *decoding = line.split()
        assert (count, decoding[0]) == (stages, "streamed,")
        assert int(peak) <= int(budget) < int(fastest)
