"""Options that several commands have, as typer reads them."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from typing import Annotated

import typer

from svd_engine.cli.console import version_option

VersionFlag = Annotated[
    bool,
    typer.Option("--version", callback=version_option, is_eager=True, help="Print the version and exit."),
]

Variant = Annotated[
    str | None,
    typer.Option(help="Variant of the checkpoint's weight files, such as fp16 (half the size)."),
]


MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Memory budget, of the GPU or of the host on the CPU: 8GiB, 0.9 (of all), auto (what is free). "
        "The fastest way that fits is taken; default no limit."
    ),
]


def integer(text: str | int) -> int:
    """A whole number, also one written as 7.0 as `VideoEngine` takes it.  Its range is checked there."""
    try:
        return int(text)
    except ValueError:
        with suppress(ValueError):
            if (number := float(text)).is_integer():
                return int(number)
    raise typer.BadParameter(f"{text!r} is not a whole number")


class DTypeOption(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class DecodingOption(StrEnum):
    """Those of `svd_engine.request`."""

    auto = "auto"
    whole = "whole"
    streamed = "streamed"


class FamilyOption(StrEnum):
    """Of random weights; those of `svd_engine.spec.weights.Family`."""

    svd = "svd"
    svd_xt = "svd-xt"
    small = "small"


class PresetOption(StrEnum):
    """Names of `svd_engine.sampling.presets`."""

    sgm = "sgm"
