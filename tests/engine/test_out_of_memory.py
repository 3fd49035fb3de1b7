"""Memory that runs out while a network runs: what is said, and an engine that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.backends.interruptible import ran_out_of_memory
from svd_engine.errors import BackendError, Cancelled, OutOfMemory
from svd_engine.residency.contract import Residency
from svd_engine.residency.offloaded import Offloaded
from svd_engine.residency.resident import Resident
from svd_engine.spec.network import Network
from svd_engine.spec.reuse import Reuse
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.watching import Stops

CALL = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 1, "output_type": "pt"}
IMAGE = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[VideoEngine]:
    with VideoEngine.from_checkpoint(
        tiny_checkpoint, backend="eager", device="cpu", memory="1000GiB"
    ) as engine:
        yield engine


def frames(engine: VideoEngine, **other: Any) -> torch.Tensor:
    made = engine(IMAGE, generator=torch.Generator().manual_seed(0), **(CALL | other)).frames
    assert isinstance(made, torch.Tensor)
    return made


def starve(engine: VideoEngine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes a network ask torch's allocator for more than there is."""
    frames(engine)  # opens them
    network = next(n for key, n in engine.residency._networks.items() if key.startswith(name))
    monkeypatch.setattr(network, "run", lambda inputs: {"x": torch.empty(2**55)})


@pytest.mark.parametrize("name", ["image_encoder", "vae_encoder", "denoiser", "vae_decoder"])
def test_the_error_names_network_plan_peak_and_what_takes_less(
    engine: VideoEngine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = frames(engine)
    with monkeypatch.context() as patched:
        starve(engine, patched, name)
        with pytest.raises(
            OutOfMemory, match=rf"^memory of cpu for {name}-.*expected room for the planned"
        ) as caught:
            frames(engine)
    assert "can't allocate memory" in caught.value.got
    assert "at its highest" in caught.value.got
    assert caught.value.__cause__ is None
    assert torch.equal(frames(engine), expected)  # usable as before

    amount = caught.value.remedy.split('"')[1]
    assert caught.value.remedy == f'Pass memory="{amount}" for the next smaller plan.'
    plan = engine.source.planner.choose(engine._settings(arguments()), 1)  # type: ignore[union-attr]
    assert int(amount.removesuffix("MiB")) * 2**20 < plan.peak_bytes


def arguments() -> dict[str, Any]:
    from inspect import signature

    defaults = {name: p.default for name, p in signature(VideoEngine.__call__).parameters.items()}
    return defaults | CALL


def test_the_smallest_plan_and_no_plan(
    engine: VideoEngine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(engine, monkeypatch, "denoiser")
    planner = engine.source.planner
    assert planner is not None
    only = planner.choose(engine._settings(arguments()), 1)
    monkeypatch.setattr(type(planner), "considered", lambda self, *_: [only])
    with pytest.raises(OutOfMemory, match="Ask for fewer frames or a smaller video"):
        frames(engine)
    with VideoEngine.from_checkpoint(
        tiny_checkpoint, backend="eager", device="cpu", memory=None
    ) as unplanned:
        starve(unplanned, monkeypatch, "denoiser")
        with pytest.raises(OutOfMemory, match=r'room for its activations.*Pass memory="auto"'):
            frames(unplanned)


def test_where_memory_seemed_ample(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was counted before; the error counts."""
    with VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu") as ample:
        assert ample._plan(ample._settings(arguments()), 1).stages == ()
        starve(ample, monkeypatch, "denoiser")
        with pytest.raises(OutOfMemory, match=r"room for the planned.*for the next smaller plan"):
            frames(ample)


def test_the_same_with_reuse(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoEngine.from_checkpoint(
        tiny_checkpoint, backend="eager", device="cpu", reuse=Reuse(2)
    ) as reusing:
        starve(reusing, monkeypatch, "full_denoiser")
        with pytest.raises(OutOfMemory, match=r"room for the planned.*for the next smaller plan"):
            frames(reusing)


def test_the_same_over_a_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine:
        starve(engine, monkeypatch, "denoiser")
        with pytest.raises(OutOfMemory, match="memory of cpu for denoiser"):
            frames(engine)


def test_another_error_stays_as_it_is(engine: VideoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    frames(engine)

    def wrong(self: Network, inputs: Any) -> Any:
        raise BackendError("x", expected="y", got="z", remedy="w")

    for network in engine.residency._networks.values():
        monkeypatch.setattr(type(network), "run", wrong)
    with pytest.raises(BackendError, match="x: expected y") as caught:
        frames(engine)
    assert not isinstance(caught.value, OutOfMemory)


@pytest.mark.parametrize(
    ("error", "is_shortage"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 4096"), True),
        (RuntimeError("createExecutionContext: OutOfMemory (no further information)"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_the_words_of_each_runtime(error: Exception, is_shortage: bool) -> None:
    """ONNX Runtime's, CUDA's and TensorRT's by their texts: none of them is out of memory here."""
    assert ran_out_of_memory(error) is is_shortage


@pytest.mark.parametrize(("residency", "calls"), [(Resident, 100), (Offloaded, 25)])
def test_cancelled_calls_give_their_memory_back(
    tiny_checkpoint: Path, residency: type[Residency], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory after all calls is as after a fifth of them: whole and streamed, to the end or cancelled
    after a step or within the streamed decoder."""
    stop = Event()

    def cancelling(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stop.set()
        return tensors

    process, after = psutil.Process(), []
    with VideoEngine.from_checkpoint(tiny_checkpoint, backend="eager", device="cpu", memory=None) as engine:
        monkeypatch.setattr(engine.backend, "movable", residency is Offloaded)
        engine.residency = residency(engine.backend)
        engine.set_progress_bar_config(disable=True)
        for number in range(calls):
            stop.clear()
            if number % 4 < 2:
                frames(engine, num_frames=1, decoding=("whole", "streamed")[number % 2])
            elif number % 4 == 2:
                with pytest.raises(Cancelled):
                    frames(engine, num_frames=1, cancel=stop, callback_on_step_end=cancelling)
            else:
                within = Stops(after=4)
                with pytest.raises(Cancelled):
                    frames(engine, num_frames=1, decoding="streamed", cancel=within, observer=within)
            after.append(process.memory_info().rss)
    few = calls // 5
    assert max(after[-few:]) - max(after[:few]) < 8 * 2**20
