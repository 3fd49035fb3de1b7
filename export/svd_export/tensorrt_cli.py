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


class Version(StrEnum):
    v10_13 = "10.13"
    v10_14 = "10.14"
    v10_15 = "10.15"
    v11 = "11"


def check(
    bundle: Annotated[Path, typer.Argument(help="Bundle to check; nothing is written.")],
    tensorrt: Annotated[Version, typer.Option(help="TensorRT version to check against.")] = Version.v11,
) -> None:
    """Check a bundle's graphs against the operators that TensorRT supports; needs no TensorRT, no GPU."""
    from svd_engine.bundle import Bundle
    from svd_engine.errors import ExportError
    from svd_export.graph_check import check_graph
    from svd_export.tensorrt_ops import OPSET_LIMITS

    opened = Bundle(bundle)
    findings = 0
    for entry in opened.manifest.networks:
        report = check_graph(opened.graph(entry.spec), tensorrt.value)
        typer.echo(f"{entry.spec.key:<40} {_summary(report)}")
        for finding in report.findings:
            typer.echo(f"  {finding}")
        findings += len(report.findings)
    if findings:
        raise ExportError(
            f"bundle {bundle}",
            expected=f"graphs that TensorRT {tensorrt.value} takes",
            got=f"{findings} findings, above",
            remedy="TensorRT takes the form primitives from 10.12: "
            "run `svd-export onnx CHECKPOINT -o BUNDLE --form primitives`, or use a newer TensorRT."
            if opened.manifest.opset > OPSET_LIMITS["10.13"][1]
            else "Report this with the versions in the manifest.",
        )


def _summary(report: GraphReport) -> str:
    heads = ", ".join(f"{count} of width {width}" for width, count in sorted(report.attentions.items()))
    verdict = f"{len(report.findings)} findings" if report.findings else "fits"
    return f"{verdict}: {report.operators} operators of {report.kinds} kinds, attention {heads or 'none'}"


class Compatibility(StrEnum):
    none = "none"
    same_cc = "same-cc"
    ampere_plus = "ampere+"


def tensorrt(
    bundle: Annotated[Path, typer.Argument(help="Bundle to build plans for, and to add them to.")],
    networks: Annotated[
        list[str] | None,
        typer.Option(
            help="Network: image_encoder, vae_encoder, denoiser or vae_decoder; default all. Repeatable."
        ),
    ] = None,
    workspace: Annotated[
        str, typer.Option(help="Largest scratch memory of a kernel, such as 8GiB or 512MiB.")
    ] = "8GiB",
    optimization_level: Annotated[
        int, typer.Option(min=0, max=5, help="Higher levels search longer for faster kernels.")
    ] = 3,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings, read and updated; default in the bundle.")
    ] = None,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Build plans that can load the same weights again.")
    ] = False,
    stripped: Annotated[
        bool, typer.Option("--stripped", help="Build plans without weights; loading reads the bundle's.")
    ] = False,
    hardware_compatibility: Annotated[
        Compatibility,
        typer.Option(help="Run on this GPU model only, on its compute capability, or on Ampere and newer."),
    ] = Compatibility.none,
) -> None:
    """Build TensorRT plans for this GPU; resume an interrupted build."""
    from svd_engine import console
    from svd_engine.bundle import Bundle
    from svd_engine.networks.spec import NETWORKS
    from svd_export.tensorrt_builder import BuildOptions
    from svd_export.to_tensorrt import build_plans

    if timing_cache is not None:
        console.check_folder(timing_cache)
    options = BuildOptions(
        memory_bytes(workspace), optimization_level, refittable, stripped, hardware_compatibility.value
    )
    opened = Bundle(bundle)
    started = time.monotonic()
    plans = build_plans(
        opened, options, networks or NETWORKS, timing_cache,
        lambda line: typer.echo(f"[{time.monotonic() - started:6.1f} s] {line}", err=True),
    )  # fmt: skip
    for plan in plans:
        size = (bundle / plan.file).stat().st_size
        typer.echo(
            f"{plan.file}: {size / 2**20:.1f} MiB, {plan.device_memory_bytes / 2**20:.1f} MiB of GPU memory"
        )


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
