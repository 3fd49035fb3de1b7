"""The options of `svd-engine generate` for the parameters of a call, made from their list (`request`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from svd_engine.cli.options import integer, numbers
from svd_engine.request import PARAMETERS, Angles, FrameScales, NoiseLevels, OneOf, Parameter, Real


def call_options(command: Callable[..., None]) -> Callable[..., None]:
    """In place of the command's `**call`, an option for every parameter that has one.

    `call` then holds their values under the names that `VideoEngine.__call__` has, and `seed`.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [_option(parameter) for parameter in PARAMETERS if parameter.option]
    command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return command


def given_options(context: typer.Context, call: Mapping[str, Any]) -> set[str]:
    """The names in `call` that the user's command line has, as against those at their defaults."""
    sources = {name: context.get_parameter_source(name) for name in call}
    return {name for name, source in sources.items() if source is None or source.name != "DEFAULT"}


def _option(parameter: Parameter) -> inspect.Parameter:
    value, parser, metavar = _read_as(parameter)
    default = parameter.call_default
    option = typer.Option(parameter.option, help=parameter.describe(), parser=parser, metavar=metavar)
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[value | None if default is None else value, option],
    )


def _read_as(parameter: Parameter) -> tuple[Any, Callable[[str], Any] | None, str | None]:
    """The type that typer shows and converts to, what reads it in typer's place, and its name in the help."""
    match parameter.kind:
        case OneOf(choices):
            return StrEnum(parameter.name, {choice: choice for choice in choices}), None, None
        case Real():
            return float, None, None
        case NoiseLevels() | FrameScales():
            return tuple, numbers, "X,X,..."
        case Angles():
            return tuple, angles, "X[,X,...]"
    return int, integer, None


def angles(text: str | float | tuple[float, ...]) -> float | tuple[float, ...]:
    """One number, or numbers with commas between them.  What they may be is checked elsewhere."""
    if isinstance(text, float):
        return text
    listed = numbers(text)
    return listed if len(listed) > 1 else listed[0]
