"""TensorRT's weight streaming: what an engine is told, what is planned, and the same frames.

Over the recording double of TensorRT, which holds no weights: it says what would stream, and moves nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.backends.fake import FUNCTIONS
from svd_engine.backends.tensorrt.network import TrtBackend
from svd_engine.bundle.flavours import TENSORRT_RTX, Host, capability_target
from svd_engine.bundle.plans import weight_bytes
from svd_engine.bundle.reading import Bundle
from svd_engine.cli.main import main
from svd_engine.errors import BackendError, BackendUnavailable, Cancelled, SettingsError
from svd_engine.info import plan_facts
from svd_engine.networks.parity import example_inputs
from svd_engine.output import VideoOutput
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget, budget_of
from svd_engine.residency.holding import Holding
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.planning import planner_of_bundle
from svd_engine.residency.shortage import shortage
from svd_engine.residency.weight_streaming import WeightStreaming
from svd_engine.spec.tensors import NetworkSpec
from tests.conftest import CHUNK, FRAMES, HEIGHT, WIDTH
from tests.support import damage, tensorrt_double, tensorrt_plans
from tests.support.commands import call
from tests.support.networks import only
from tests.support.tensorrt_double import Fault, TensorRT
from tests.support.tensorrt_plans import add_plan, add_streaming_plans, denoiser, plan_of, specs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALL = 2**60
SCRATCH = 100  # bytes for weights in passing
BUDGET = "ICudaEngine.weight_streaming_budget_v2"


@pytest.fixture
def folder(tiny_half_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose plans were all built with weight streaming."""
    folder = damage.copy(tiny_half_bundle, tmp_path)
    add_streaming_plans(folder, SCRATCH)
    return folder


@pytest.fixture
def trt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    """It computes what the fake backend does."""
    double = tensorrt_double.install(monkeypatch)
    by_key = {spec.key: spec for spec in specs(folder)}
    double.compute = lambda key, inputs: FUNCTIONS[by_key[key].network](inputs, by_key[key])
    return double


def weights_of(folder: Path, spec: NetworkSpec) -> int:
    bundle = Bundle(folder)
    return weight_bytes(bundle, spec, bundle.plans(spec)[0])


# What an engine is told


def test_the_budget_is_set_before_the_context(trt: TensorRT, folder: Path) -> None:
    """TensorRT takes none beside a context; what stays leaves room for what it needs in passing."""
    network = TrtBackend(Bundle(folder), CPU).open_streaming(denoiser(folder), 1000)
    order = [name for name in trt.order() if name.startswith(("ICudaEngine", "Runtime"))]
    assert order[2:] == [BUDGET, BUDGET, "ICudaEngine.create_execution_context"]
    assert trt.called(BUDGET) == [(0,), (1000 - SCRATCH,)]
    assert network.placement.detail.endswith("MiB of weights streamed in each run")
    expected = weights_of(folder, network.spec) - (1000 - SCRATCH)
    assert network.engine.streamable_weights_size - network.engine.weight_streaming_budget_v2 == expected


@pytest.mark.parametrize(
    ("held", "stays"),
    [(0, 0), (SCRATCH, 0), (SCRATCH + 1, 1), (ALL, None)],
)
def test_as_much_stays_as_there_is_room_for(
    trt: TensorRT, folder: Path, held: int, stays: int | None
) -> None:
    """At most all of it, with which nothing streams."""
    network = TrtBackend(Bundle(folder), CPU).open_streaming(denoiser(folder), held)
    weights = weights_of(folder, network.spec)
    assert network.engine.weight_streaming_budget_v2 == (weights if stays is None else stays)


def test_weights_that_cannot_stream_count(trt: TensorRT, folder: Path) -> None:
    spec = denoiser(folder)
    damage.edit(folder, lambda m: m.update(plans=[p for p in m["plans"] if p["network"] != spec.key]))
    streamable = Bundle(folder).manifest.files[Bundle(folder).entry(spec).weights].bytes - 300
    add_plan(folder, spec, plan_of(spec, streamable=streamable, scratch=SCRATCH), least_weight_bytes=400)
    network = TrtBackend(Bundle(folder), CPU).open_streaming(spec, 1000)
    assert network.engine.weight_streaming_budget_v2 == 1000 - 300 - SCRATCH


def test_more_than_was_planned_is_said(
    trt: TensorRT, folder: Path, notices: pytest.LogCaptureFixture
) -> None:
    TrtBackend(Bundle(folder), CPU).open_streaming(denoiser(folder), SCRATCH - 1)
    (line,) = (message for message in notices.messages if message.startswith("weights of"))
    assert line.startswith(f"weights of {denoiser(folder).key} take 0.0 MiB while they stream, planned were")


def test_an_engine_that_does_not_take_it(trt: TensorRT, folder: Path) -> None:
    trt.faults[BUDGET] = Fault(returns=False, says="built without weight streaming support")
    with pytest.raises(
        BackendError, match="expected weights that stream, got built without weight"
    ) as caught:
        TrtBackend(Bundle(folder), CPU).open_streaming(denoiser(folder), 1000)
    assert "svd-export tensorrt" in caught.value.remedy


def test_its_launches_are_not_recorded(trt: TensorRT, folder: Path) -> None:
    """Copies of weights are no part of a CUDA graph; the block of activations has room for them."""
    network = TrtBackend(Bundle(folder), CPU).open_streaming(denoiser(folder), 1000)
    inputs = example_inputs(network.spec)
    for _ in range(3):
        assert torch.equal(only(network(**inputs)), only(FUNCTIONS["denoiser"](inputs, network.spec)))
    assert trt.called("cuda.capture", "cuda.replay") == []
    assert ("TensorRT's activations", (3000 + SCRATCH,)) in trt.called("cuda.empty")


def test_tensorrt_for_rtx_records_none_either(
    tiny_half_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = damage.copy(tiny_half_bundle, tmp_path)
    trt = tensorrt_double.install(monkeypatch, "1.7.1.116", TENSORRT_RTX, (8, 9))
    spec, host = denoiser(folder), Host("tensorrt-rtx", "1.7.1.116", tensorrt_double.GPU, (8, 9))
    plan = plan_of(spec, streamable=5000, scratch=SCRATCH)
    add_plan(folder, spec, plan, host, capability_target(((8, 9),)), least_weight_bytes=SCRATCH)
    TrtBackend(Bundle(folder), CPU, TENSORRT_RTX).open_streaming(spec, 1000)
    assert trt.called("ICudaEngine.create_execution_context") == [("USER_MANAGED", "DISABLED")]


def test_opened_otherwise_all_weights_stay(trt: TensorRT, folder: Path) -> None:
    TrtBackend(Bundle(folder), CPU).open(denoiser(folder))
    assert trt.called(BUDGET) == []


# What is planned


def call_of(**other: Any) -> Settings:
    return Settings(**{"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "steps": 4, **other})


def planner_of(folder: Path, budget: int = ALL) -> Planner:
    return planner_of_bundle(Bundle(folder), Budget(budget), "tensorrt", CUDA)


def streaming_plans(folder: Path, budget: int) -> list[Plan]:
    plans = planner_of(folder, budget).considered(call_of(), 1)
    return [plan for plan in plans if plan.residency is WeightStreaming]


def test_peak_and_bytes_of_a_plan_that_streams(folder: Path) -> None:
    """The peak is the budget as long as there are weights left that can stream."""
    assert streaming_plans(folder, ALL) == []  # all weights stay: the same as swapped
    swapped = next(p for p in planner_of(folder).considered(call_of(), 1) if p.residency.name == "swapped")
    stage = swapped.stages[2]
    tight = stage.peak_bytes - 1000
    plan = streaming_plans(folder, tight)[0]
    streams = plan.stages[2]
    assert streams.peak_bytes == tight
    assert streams.held_bytes == stage.held_bytes - 1000
    assert streams.streamed_bytes == 1000 + SCRATCH
    evaluations = 4
    assert streams.moved_bytes == stage.moved_bytes + evaluations * streams.streamed_bytes
    assert plan.cost > swapped.cost
    assert plan.streaming[streams.network] == streams.held_bytes
    assert "of weights streamed in each run of denoiser" in str(plan)
    least = streaming_plans(folder, 0)[0].stages[2]
    assert (least.held_bytes, least.streamed_bytes) == (SCRATCH, stage.held_bytes)
    assert plan.report(tight).streamed_bytes == plan.streamed_bytes


def test_more_memory_never_gives_a_slower_plan(folder: Path) -> None:
    peaks = sorted(plan.peak_bytes for plan in planner_of(folder, 0).considered(call_of(), 1))
    most = max(plan.peak_bytes for plan in planner_of(folder).considered(call_of(), 1))
    costs = []
    for budget in range(peaks[0], most + 1, (most - peaks[0]) // 40):
        plan = planner_of(folder, budget).choose(call_of(), 1)
        assert plan.peak_bytes <= budget
        costs.append(plan.cost)
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 20  # each step leaves more weights where they are


def test_a_refusal_names_what_is_accepted(folder: Path) -> None:
    smallest = min(plan.peak_bytes for plan in planner_of(folder, 0).considered(call_of(), 1))
    assert planner_of(folder, smallest).choose(call_of(), 1).residency is WeightStreaming
    with pytest.raises(
        SettingsError, match=r"networks streaming, .* of weights streamed in each run of denoiser"
    ):
        planner_of(folder, smallest - 1).choose(call_of(), 1)


def test_without_plans_for_it_the_strategy_is_left_out(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planner = planner_of(planned, 0)
    assert {plan.residency.name for plan in planner.considered(call_of(), 1)} == {"resident", "swapped"}
    assert all("weight streaming of denoiser" in str(reason) for reason in planner.left_out(call_of(), 1))
    arguments = ("--backend", "tensorrt", "--device", "cuda", "--memory", "8GiB", "--all")
    assert call(main, "plan", planned, *arguments) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"not considered: weight streaming of denoiser-\S+ in bundle .*: expected plans of", said
    )
    assert f"Run: svd-export tensorrt {planned} --flavour tensorrt --stream-weights\n" in said


def test_the_command_shows_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tight = streaming_plans(folder, 0)[0].peak_bytes
    arguments = ("--backend", "tensorrt", "--device", "cuda", "--memory", f"{tight // 1000 + 1}KB", "--all")
    assert call(main, "plan", folder, *arguments) == 0
    said = capsys.readouterr().out
    assert "\nstreaming  " in said
    assert "not considered" not in said
    assert "of weights streamed in each run of denoiser" in said.splitlines()[-1]


def test_info_says_which_plans_can(folder: Path) -> None:
    assert all("weights that can stream" in fact for fact in plan_facts(Bundle(folder)).values())


# Plans of some ways


def without(folder: Path, part: str) -> None:
    damage.edit(folder, lambda m: m.update(plans=[p for p in m["plans"] if part not in p["network"]]))


def test_ways_without_plans_are_left_out(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of both halves of guidance none was built: what is left runs, and is said."""
    batched, single = sorted(s.key for s in specs(planned) if s.network == "denoiser")
    assert "single" in single
    damage.edit(planned, lambda m: m.update(plans=[p for p in m["plans"] if p["network"] != batched]))
    planner = planner_of(planned)
    assert {plan.profile.guidance for plan in planner.considered(call_of(), 1)} == {"single"}
    assert planner.usual(call_of(), 1).profile.guidance == "single"
    automatic = replace(planner, budget=Budget(ALL, ALL))
    assert automatic.choose(call_of(), 1).profile.guidance == "single"
    with pytest.raises(BackendUnavailable, match=f"plan of {batched} in bundle"):
        planner.unplanned(call_of(), 1)
    arguments = ("--backend", "tensorrt", "--device", "cuda", "--memory")
    assert call(main, "plan", planned, *arguments, "8GiB", "--all") == 0
    said = capsys.readouterr().out
    assert f"not considered: plan of {batched} in bundle" in said
    assert "single guidance" in said.splitlines()[-1]
    assert call(main, "plan", planned, *arguments, "none") == 1


def test_where_no_way_is_left_the_first_is_named(planned: Path) -> None:
    without(planned, "denoiser")
    planner = planner_of(planned)
    for asked in (planner.choose, planner.considered, planner.usual):
        with pytest.raises(BackendUnavailable, match=r"plan of denoiser-\S+ in bundle .* Run: svd-export"):
            asked(call_of(), 1)


def test_a_refusal_leaves_out_calls_without_plans(planned: Path) -> None:
    """Of the lesser calls that it may name, none can be run here."""
    with pytest.raises(SettingsError, match=r'Pass memory="\d+MiB"\.$|Pass memory="\S+"\.$'):
        planner_of(planned, 0).choose(call_of(), 1)


# The engine


@pytest.fixture
def double(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = damage.copy(tiny_bundle, tmp_path)
    made = tensorrt_plans.with_onnxruntime(folder, monkeypatch, lambda f: add_streaming_plans(f, SCRATCH))
    made.folder = folder
    return made


def video(engine: VideoEngine, steps: int = 3, **other: Any) -> VideoOutput:
    image = torch.rand((1, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    made = engine(
        image, HEIGHT, WIDTH, FRAMES, num_inference_steps=steps, decode_chunk_size=CHUNK,
        generator=torch.Generator().manual_seed(0), **{"output_type": "pt", **other},
    )  # fmt: skip
    assert isinstance(made, VideoOutput)
    return made


def within(engine: VideoEngine, peak: int) -> None:
    """Gives an engine a budget of so many bytes."""
    assert engine.source.planner is not None
    engine.source = replace(engine.source, planner=replace(engine.source.planner, budget=Budget(peak)))


def test_the_same_frames_from_weights_that_stream(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget that a call's plan gives; another one opens the denoiser anew."""
    monkeypatch.setattr("svd_engine.residency.planner.used_by_runtime", lambda device: 0)  # it grows here
    with VideoEngine.from_bundle(double.folder, backend="tensorrt", memory=ALL) as engine:
        expected = video(engine)
        assert expected.report.plan is not None
        assert expected.report.plan.residency == "resident"
        assert double.called(BUDGET) == []
        within(engine, 0)
        assert engine.source.planner is not None
        least = min(p.peak_bytes for p in engine.source.planner.considered(call_of(steps=3), 1))
        for more in (0, 5000):
            double.calls.clear()
            within(engine, least + more)
            got = video(engine)
            assert got.report.plan is not None
            assert got.report.plan.residency == "streaming"
            assert torch.equal(got.frames, expected.frames)
            stage = got.report.plan.stages[2]
            assert (stage.held_bytes - SCRATCH,) in double.called(BUDGET)
            assert "of weights streamed in each run" in got.report.stages["denoiser"].detail
            assert double.called("cuda.capture") == []


def test_where_memory_ran_out_the_next_smaller_plan_streams_more(folder: Path) -> None:
    """Also of a plan of which nothing streams: at its own budget, streaming would be the same."""
    swapped = next(p for p in planner_of(folder).considered(call_of(), 1) if p.residency.name == "swapped")
    for budget in (swapped.peak_bytes, swapped.peak_bytes - 100_000):
        planner = replace(planner_of(folder, budget), holding=Holding(CUDA, outside_torch=True))
        plan = planner.choose(call_of(), 1)
        planner.keep(plan)  # it is loaded, and does not count beside itself
        error = shortage("denoiser", "no room", CPU, plan, planner, call_of(), 1)
        amount = re.fullmatch(r'Pass memory="(\d+MiB)" for the next smaller plan\.', error.remedy)
        assert amount
        less = planner_of(folder, budget_of(amount[1], CUDA).bytes).choose(call_of(), 1)
        assert less.peak_bytes < plan.peak_bytes


def test_cancelled_calls_give_their_memory_back(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory after 30 calls, of which every other one is cancelled after a step, is as after 6; every
    engine of TensorRT that was made is gone."""
    monkeypatch.setattr("svd_engine.residency.planner.used_by_runtime", lambda device: 0)
    stop, process, after, made = Event(), psutil.Process(), [], Counter[str]()

    def cancelling(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stop.set()
        return tensors

    with VideoEngine.from_bundle(double.folder, backend="tensorrt", memory=ALL) as engine:
        engine.set_progress_bar_config(disable=True)
        within(engine, 0)
        assert engine.source.planner is not None
        least = min(p.peak_bytes for p in engine.source.planner.considered(call_of(steps=1), 1))
        within(engine, least)
        for number in range(30):
            stop.clear()
            if number % 2:
                with pytest.raises(Cancelled):
                    video(engine, steps=1, cancel=stop, callback_on_step_end=cancelling)
            else:
                plan = video(engine, steps=1, output_type=("pt", "latent")[number % 4 // 2]).report.plan
                assert plan is not None
                assert plan.residency == "streaming"
            after.append(process.memory_info().rss)
            made.update(double.order())
            double.calls.clear()
    made.update(double.order())
    assert made["Runtime.deserialize_cuda_engine"] > 90
    assert made["ICudaEngine.freed"] == made["Runtime.deserialize_cuda_engine"]
    assert max(after[-6:]) - max(after[:6]) < 8 * 2**20
