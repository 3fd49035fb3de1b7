"""The page's sliders, lists and fields, made from the list of a call's parameters (`request`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from svd_engine.engine import VideoEngine
from svd_engine.request import SEED, SETTINGS, FrameScales, NoiseLevels, OneOf, Parameter, Real, Whole

NOT_SHOWN = {"num_videos_per_prompt"}  # a page makes one at a time, and another with another seed
SHOWN = tuple(p for p in SETTINGS if p.option and p.name not in NOT_SHOWN)
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
            low, high = (*parameter.usual,)
            step = 1 if isinstance(parameter.kind, Whole) else slider_step(low, high)
            return gr.Slider(min(low, value), max(high, value), step=step, **named)
        case NoiseLevels() | FrameScales():
            return gr.Textbox(placeholder="numbers with commas between them", max_lines=1, **named)
    return gr.Number(**named)


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

    Raises SettingsError.
    """
    given = {p.name: _read(p, v) for p, v in zip(SHOWN, values, strict=True) if v not in (None, "")}
    own = {p.name: own_value(p, engine) for p in SHOWN}
    return {name: value for name, value in given.items() if value != own[name]}


def read_seed(text: object) -> int:
    """Raises SettingsError."""
    number: object = text
    with suppress(ValueError):
        number = int(str(text))
    return int(SEED.kind.check(SEED.name, number))  # type: ignore[call-overload, no-any-return]


def _read(parameter: Parameter, value: object) -> Any:
    if isinstance(value, str) and isinstance(parameter.kind, (NoiseLevels, FrameScales)):
        with suppress(ValueError):
            value = [float(part) for part in value.split(",")]
    return parameter.kind.check(parameter.name, value)
