"""Commands `svd-export check` and `svd-export tensorrt`: arguments in, progress and exit codes out."""

from __future__ import annotations

import re
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svd_export.graph_check import GraphReport


class VersionOption(StrEnum):
    v10_14 = "10.14"
    v10_15 = "10.15"
    v11 = "11"


class Card(StrEnum):
    sm75 = "sm75"
    sm80 = "sm80"
    sm86 = "sm86"
    sm89 = "sm89"
    sm120 = "sm120"
    sm121 = "sm121"


def check(
    bundle: Annotated[Path, typer.Argument(help="Bundle to check; nothing is written.")],
    tensorrt: Annotated[
        VersionOption | None,
        typer.Option(
            help="TensorRT version whose table to ask. Default: an installed parser, else the table of 11."
        ),
    ] = None,
    target: Annotated[
        Card | None,
        typer.Option(case_sensitive=False, help="Check TensorRT for RTX's rules of this kind of card too."),
    ] = None,
) -> None:
    """Check whether TensorRT takes a bundle's graphs; needs no GPU.  Says who answered."""
    from svd_engine.bundle.reading import Bundle
    from svd_engine.errors import ExportError
    from svd_export import compiled
    from svd_export.graph_check import check_graph

    if tensorrt is not None and target is not None:
        raise typer.BadParameter("--target asks for the rules of TensorRT for RTX: leave out --tensorrt")
    opened = Bundle(bundle)
    parser = compiled.installed() if tensorrt is None else None
    version = tensorrt or VersionOption.v11
    if parser is None:
        asked = f"the table of TensorRT {version.value}"
    else:
        asked = f"the parser of TensorRT for RTX {parser}, and the table"
    findings = 0
    for entry in opened.manifest.networks:
        graph = opened.graph(entry.spec, "tensorrt")
        report = check_graph(graph, version.value, target and target.value)
        found = [*report.findings, *(compiled.parse_errors(graph) if parser else ())]
        typer.echo(f"{entry.spec.key:<40} {_summary(report, len(found))}")
        for finding in found:
            typer.echo(f"  {finding}")
        findings += len(found)
    typer.echo(f"asked: {asked}")
    if findings:
        raise ExportError(
            f"bundle {bundle}",
            expected="graphs without findings"
            if target is None
            else f"graphs without findings for {target.value}",
            got=f"{findings}, above",
            remedy="Report this with the versions in the manifest."
            if target is None
            else f"Build without {target.value}; TensorRT (--flavour tensorrt) builds on such a card.",
        )


def _summary(report: GraphReport, findings: int) -> str:
    widths = [
        f"{count} of width {width}{note}"
        for counts, note in ((report.fused, ""), (report.apart, " as products"))
        for width, count in sorted(counts.items())
    ]
    verdict = f"{findings} findings" if findings else "fits"
    kinds = f"{report.operators} operators of {report.kinds} kinds"
    return f"{verdict}: {kinds}, attention {', '.join(widths) or 'none'}"


class Compatibility(StrEnum):
    none = "none"
    same_cc = "same-cc"
    ampere_plus = "ampere+"


class FlavourOption(StrEnum):
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


ONLY = "Only --flavour tensorrt."


def tensorrt(
    bundle: Annotated[Path, typer.Argument(help="Bundle to build plans for, and to add them to.")],
    flavour: Annotated[
        FlavourOption | None,
        typer.Option(
            help="tensorrt builds on the GPU that runs the plan; tensorrt-rtx compiles for RTX cards, "
            "with or without a GPU. Default the one installed, or of both the one for the card here."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Cards to build for: here, portable, or a list such as sm86,sm89,sm120. Default here; "
            "without a GPU portable. Lists and portable only with tensorrt-rtx."
        ),
    ] = None,
    networks: Annotated[
        list[str] | None,
        typer.Option(
            help="Network: image_encoder, vae_encoder, denoiser, shallow_denoiser, vae_decoder or "
            "decoder_segment; default all. Repeatable."
        ),
    ] = None,
    workspace: Annotated[
        str | None,
        typer.Option(help=f"Largest scratch memory of a kernel, such as 512MiB; default 8GiB. {ONLY}"),
    ] = None,
    optimization_level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help=f"Higher levels search longer for faster kernels; default 3. {ONLY}"),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help=f"File of kernel timings, read and updated; default in the bundle. {ONLY}"),
    ] = None,
    refittable: Annotated[
        bool,
        typer.Option(
            "--refittable",
            help=f"Build plans that take other weights later: `svd-export lora` keeps them. {ONLY}",
        ),
    ] = False,
    stripped: Annotated[
        bool,
        typer.Option("--stripped", help=f"Build plans without weights; loading reads the bundle's. {ONLY}"),
    ] = False,
    hardware_compatibility: Annotated[
        Compatibility,
        typer.Option(
            help=f"Run on this GPU model only, on its compute capability, or on Ampere and newer. {ONLY}"
        ),
    ] = Compatibility.none,
    stream_weights: Annotated[
        bool,
        typer.Option(
            "--stream-weights",
            help="Build plans whose weights can stay in host memory and stream in every run, as much of them "
            "as a memory budget asks for.",
        ),
    ] = False,
) -> None:
    """Build TensorRT plans into a bundle; resume an interrupted build."""
    from svd_engine.bundle.reading import Bundle
    from svd_engine.cli import console
    from svd_engine.report import peak_host_bytes
    from svd_export.tensorrt_builder import BuildOptions
    from svd_export.to_tensorrt import build_plans

    if timing_cache is not None:
        console.check_folder(timing_cache)
    options = BuildOptions(
        None if workspace is None else memory_bytes(workspace),
        optimization_level,
        refittable,
        stripped,
        hardware_compatibility.value,
        stream_weights,
    )
    opened = Bundle(bundle)
    started = time.monotonic()
    try:
        plans = build_plans(
            opened, options, networks or None, timing_cache,
            lambda line: typer.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True),
            flavour.value if flavour else None, target,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; finished plans are kept; run the same command to resume", err=True)
        raise
    for plan in plans:
        size = (bundle / plan.file).stat().st_size
        typer.echo(
            f"{plan.file}: {size / 2**20:.1f} MiB, {plan.device_memory_bytes / 2**20:.1f} MiB of activations"
        )
    typer.echo(f"{time.monotonic() - started:.0f} s, at most {peak_host_bytes() / 2**30:.1f} GiB of memory")


def memory_bytes(text: str) -> int:
    """Of "8GiB" or "512MiB".  Raises SettingsError."""
    from svd_engine.errors import SettingsError

    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB)", text)
    size = int(float(found[1]) * {"GiB": 2**30, "MiB": 2**20}[found[2]]) if found else 0
    if not size:
        raise SettingsError(
            "workspace", expected="a size such as 8GiB or 512MiB", got=repr(text), remedy="Write it so."
        )
    return size
