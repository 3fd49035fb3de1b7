"""The page's sliders, lists and fields, made from the list of a call's parameters (`request`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from svd_engine.engine import VideoEngine
from svd_engine.errors import SettingsError
from svd_engine.request import SEED, SETTINGS, Angles, FrameScales, NoiseLevels, OneOf, Parameter, Real, Whole
from svd_engine.values import finite

NOT_SHOWN = {"num_videos_per_prompt"}  # a page makes one at a time, and another with another seed
SHOWN = tuple(p for p in SETTINGS if p.option and p.name not in NOT_SHOWN)
(STEPS,) = (p for p in SETTINGS if p.field == "steps")
SIZE = ("num_frames", "height", "width")
LARGEST = 2  # times the model's own size: what a visitor may ask for
FIRST = ("num_inference_steps", "fps", "motion_bucket_id", "fit")  # the others are folded away


def own_value(parameter: Parameter, engine: VideoEngine) -> Any:
    """What a call takes that does not name the parameter."""
    owner = {"profile": engine.default, "model": engine.model}.get(parameter.own)
    return parameter.default if owner is None else getattr(owner, parameter.field)


def control(parameter: Parameter, engine: VideoEngine) -> Any:
    """A component of Gradio, set to the engine's own value."""
    value = own_value(parameter, engine)
    named = {
        "label": label(parameter), "info": parameter.describe(), "value": value, "interactive": True,
        "elem_id": parameter.name,
    }  # fmt: skip
    match parameter.kind:
        case OneOf(choices):
            return gr.Dropdown(choices=list(choices), **named)
        case Whole() | Real() if parameter.usual:
            step = 1 if isinstance(parameter.kind, Whole) else slider_step(*parameter.usual)
            return gr.Slider(*span(parameter, engine), step=step, **named)
        case NoiseLevels() | FrameScales() | Angles():
            return gr.Textbox(placeholder="numbers with commas between them", max_lines=1, **named)
    return gr.Number(**named)


def reset(parameter: Parameter, engine: VideoEngine) -> Any:
    """What sets a control to another engine's own value."""
    value = own_value(parameter, engine)
    if not parameter.usual:
        return gr.update(value=value)
    low, high = span(parameter, engine)
    return gr.update(value=value, minimum=low, maximum=high)


def span(parameter: Parameter, engine: VideoEngine) -> tuple[float, float]:
    """Of a slider: what is usual, and the engine's own value."""
    value, usual = own_value(parameter, engine), parameter.usual or ()
    return min(value, *usual), max(value, *usual)


def seed_control() -> Any:
    """Text, not a number: a browser's numbers hold 53 bits."""
    return gr.Textbox(
        str(SEED.default), label=label(SEED), info=SEED.describe(), max_lines=1, elem_id=SEED.name
    )


def label(parameter: Parameter) -> str:
    """The name of the command's option as words: "Motion bucket id"."""
    return (parameter.option or parameter.name).lstrip("-").replace("-", " ").capitalize()


def slider_step(low: float, high: float) -> float:
    """A power of ten, of which the span holds 50 to 500."""
    return float(10 ** math.floor(math.log10((high - low) / 50)))


def arguments(engine: VideoEngine, values: Sequence[object]) -> dict[str, Any]:
    """Those of a call, from the values of the controls of SHOWN; left out what is the engine's own anyway.

    Raises SettingsError, for what would keep the machine from others as well.
    """
    given = {p.name: _read(p, v, engine) for p, v in zip(SHOWN, values, strict=True) if v not in (None, "")}
    own = {p.name: own_value(p, engine) for p in SHOWN}
    if math.prod((own | given)[name] for name in SIZE) > LARGEST * math.prod(own[name] for name in SIZE):
        raise SettingsError(
            "frames x height x width",
            expected=f"at most {LARGEST} times the model's own {' x '.join(str(own[name]) for name in SIZE)}",
            got=" x ".join(str((own | given)[name]) for name in SIZE),
            remedy="Make it smaller.",
        )
    return {name: value for name, value in given.items() if value != own[name]}


def read_seed(text: object) -> int:
    """Raises SettingsError."""
    number: object = text
    with suppress(ValueError):
        number = int(str(text))
    return int(SEED.kind.check(SEED.name, number))  # type: ignore[call-overload, no-any-return]


def _read(parameter: Parameter, value: object, engine: VideoEngine) -> Any:
    if isinstance(value, str) and isinstance(parameter.kind, (NoiseLevels, FrameScales, Angles)):
        with suppress(ValueError):
            value = [float(part) for part in value.split(",")]
            if isinstance(parameter.kind, Angles) and len(value) == 1:
                (value,) = value  # of every frame
    checked: Any = parameter.kind.check(parameter.name, value)
    if parameter.usual:
        finite(parameter.name, checked, *span(parameter, engine))
    if isinstance(parameter.kind, NoiseLevels) and isinstance(checked, tuple):
        finite("steps of sigmas", len(checked) - 1, *span(STEPS, engine))
    return checked
