"""Whatever state of torch the program around the engine has set: same frames, and the state stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine import VideoEngine
from svd_engine.errors import NonFiniteOutput, SettingsError
from svd_engine.torch_state import own_torch_state
from tests.conftest import FRAMES, HEIGHT, WIDTH
from tests.engine.test_engine import CALL as TWO_STEPS
from tests.engine.test_engine import images, seeded

CALL: dict[str, Any] = {**TWO_STEPS, "num_inference_steps": 1}
STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def state(function: Callable[[], Iterator[None]]) -> None:
    STATES[function.__name__] = contextmanager(function)


def default_dtype(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    @contextmanager
    def changed() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return changed


for name in ("bfloat16", "float64"):
    STATES[f"default {name}"] = default_dtype(getattr(torch, name))
STATES["autocast bfloat16"] = lambda: torch.autocast("cpu", torch.bfloat16)
STATES["inference mode"] = torch.inference_mode
STATES["gradients on"] = torch.enable_grad
STATES["with a device"] = lambda: torch.device("meta")


@state
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@state
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@state
def inference_mode_and_autocast_and_device() -> Iterator[None]:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        yield


def seen() -> tuple[Any, ...]:
    """All of the caller's state that the engine touches, or might."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


def opened(kind: str, request: pytest.FixtureRequest) -> VideoEngine:
    if kind == "bundle":
        return VideoEngine.from_bundle(request.getfixturevalue("tiny_bundle"), device="cpu")
    folder: Path = request.getfixturevalue("tiny_checkpoint")
    rewrites = ["frames-in-place"] if "without" in kind else []  # diffusers' own code for one part
    return VideoEngine.from_checkpoint(folder, backend="eager", device="cpu", without_rewrites=rewrites)


def noise() -> torch.Tensor:
    shape = (1, FRAMES, 4, HEIGHT // 2, WIDTH // 2)
    return torch.randn(shape, generator=seeded(5), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return images(1)


@pytest.fixture(scope="module", params=["bundle", "checkpoint"])
def source(request: pytest.FixtureRequest, image: torch.Tensor) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The kind, and its frames in a program that has set nothing: drawn, and from given latents."""
    with opened(request.param, request) as engine:
        drawn = engine(image, generator=seeded(), **CALL).frames
        given = engine(image, generator=seeded(), latents=noise(), **CALL).frames
    return request.param, drawn, given


@pytest.mark.parametrize("name", STATES)
def test_the_programs_state_changes_nothing_and_stays(
    name: str,
    source: tuple[str, torch.Tensor, torch.Tensor],
    image: torch.Tensor,
    request: pytest.FixtureRequest,
) -> None:
    """Opened, called, failed and closed in the state; what was opened in it also runs outside."""
    kind, drawn, given = source

    def edit(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["latents"] = tensors["latents"] * 1.0
        return tensors

    def fail(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * float("nan")}

    with STATES[name]():
        before = seen()
        engine = opened(kind, request)
        assert torch.equal(engine(image, generator=seeded(), callback_on_step_end=edit, **CALL).frames, drawn)
        latents = noise().requires_grad_(name == "gradients on")
        result = engine(image, generator=seeded(), latents=latents, **CALL)
        assert torch.equal(result.frames, given)
        assert (result.frames.dtype, result.frames.requires_grad) == (torch.float32, False)
        with pytest.raises(SettingsError):
            engine(image, **{**CALL, "num_inference_steps": 0})
        with pytest.raises(NonFiniteOutput):
            engine(image, callback_on_step_end=fail, **CALL)
        assert seen() == before
    result = engine(image, generator=seeded(), latents=latents, **CALL)
    assert torch.equal(result.frames, given)
    result.frames.mul_(1)  # the caller's own, an ordinary tensor
    with STATES[name]():
        engine.close()
        assert seen() == before


def test_in_a_callback_the_state_is_the_engines(image: torch.Tensor, tiny_bundle: Path) -> None:
    states = []

    def look(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        states.append(seen()[:5])
        return tensors

    with (
        STATES["inference_mode_and_autocast_and_device"](),
        VideoEngine.from_bundle(tiny_bundle, device="cpu") as engine,
    ):
        engine(image, callback_on_step_end=look, **CALL)
    assert len(states) == CALL["num_inference_steps"]
    for inference, grad, autocast, _, device in states:
        assert (inference, grad, autocast, device) == (False, False, False, torch.device("cpu"))


def test_the_state_is_that_of_one_thread() -> None:
    """Another thread, which computes meanwhile, sees nothing of it."""
    from tests.engine.watching import Running

    def look() -> tuple[Any, ...]:
        return seen()

    outside = Running(look).value()
    with own_torch_state():
        assert Running(look).value() == outside
