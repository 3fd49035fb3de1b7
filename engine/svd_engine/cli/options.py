"""Options that several commands have, as typer reads them."""

from __future__ import annotations

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from svd_engine.backends.registry import NAMES
from svd_engine.cli.console import version_option
from svd_engine.spec.weights import Component

VersionFlag = Annotated[
    bool,
    typer.Option("--version", callback=version_option, is_eager=True, help="Print the version and exit."),
]

Variant = Annotated[
    str | None,
    typer.Option(help="Variant of the checkpoint's weight files, such as fp16 (half the size)."),
]


UNetPart = Annotated[
    str | None,
    typer.Option("--unet", help="File or folder of the UNet in place of the checkpoint's."),
]
VaePart = Annotated[
    str | None,
    typer.Option("--vae", help="File or folder of the VAE in place of the checkpoint's."),
]
ImageEncoderPart = Annotated[
    str | None,
    typer.Option(
        "--image-encoder",
        help="File or folder of the image encoder in place of the checkpoint's.",
    ),
]
BackendOption = Annotated[
    str, typer.Option(metavar=f"[{'|'.join(NAMES)}]", help="Backend to run on; auto chooses and says why.")
]
SwapNetworks = Annotated[
    bool, typer.Option("--swap-networks", help="Keep one network in memory at a time: less memory, slower.")
]
MemoryOption = Annotated[
    str,
    typer.Option(
        metavar="[auto|none|8GiB|0.9]",
        help="Memory budget, of the GPU or of the host on the CPU: 8GiB, 0.9 (of all), auto (what is free) "
        "or none. The fastest way that fits is taken.",
    ),
]

ReuseOption = Annotated[
    int | None,
    typer.Option(
        "--reuse",
        metavar="N",
        help="Run the whole denoiser in one of N evaluations only, and in the others its outermost part "
        "on what that one left: faster, lossy. Off by default. A bundle is exported for it "
        "(svd-export onnx --reuse-branch).",
    ),
]
ReuseBranch = Annotated[
    int | None,
    typer.Option(
        "--reuse-branch",
        help="With --reuse: how much the others run, DeepCache's branch; default 0, the least, or the "
        "bundle's own.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="A,B",
        help="Two devices in place of --device, such as cuda:0,cuda:1: each runs one half of guidance, "
        "at the same time. Same video. --memory bounds each.",
    ),
]


def memory_of(option: str) -> str | None:
    """As `VideoEngine` takes it."""
    return None if option == "none" else option


def devices_of(option: str | None) -> list[str] | None:
    """As `VideoEngine` takes them.  How many they may be is checked there."""
    return None if option is None else [name.strip() for name in option.split(",")]


def parts_of(unet: str | None, vae: str | None, image_encoder: str | None) -> dict[Component, str | Path]:
    """Those that were given, as `open_checkpoint` takes them."""
    given: dict[Component, str | None] = {"unet": unet, "vae": vae, "image_encoder": image_encoder}
    return {part: source for part, source in given.items() if source is not None}


LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="LoRA file to fuse into the UNet, and its scale, default 1. Repeatable.",
    ),
]
LoraPartial = Annotated[
    bool, typer.Option("--lora-partial", help="Leave out LoRA keys that fit no weight of the UNet.")
]


def lora_of(given: list[str] | None) -> dict[str | Path, float]:
    """Scales by file, as `open_checkpoint` takes them.  A file whose name ends as a scale would is a file."""
    scales: dict[str | Path, float] = {}
    for text in given or ():
        file, scale = text, 1.0
        before, colon, after = text.rpartition(":")
        if colon and not Path(text).exists():
            with suppress(ValueError):
                file, scale = before, float(after)
        if file in scales:
            raise typer.BadParameter(f"--lora {file} is given twice")
        scales[file] = scale
    return scales


def integer(text: str | int) -> int:
    """A whole number, also one written as 7.0 as `VideoEngine` takes it.  Its range is checked there."""
    try:
        return int(text)
    except ValueError:
        with suppress(ValueError):
            if (number := float(text)).is_integer():
                return int(number)
    raise typer.BadParameter(f"{text!r} is not a whole number")


def numbers(text: str | tuple[float, ...]) -> tuple[float, ...]:
    """Numbers with commas between them.  What they may be is checked elsewhere."""
    if isinstance(text, tuple):
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers with commas between them") from None


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
    sv3d_u = "sv3d-u"
    sv3d_p = "sv3d-p"
    small = "small"


class PresetOption(StrEnum):
    """Names of `svd_engine.sampling.presets`."""

    sgm = "sgm"
    animatelcm = "animatelcm"
