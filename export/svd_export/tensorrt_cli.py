"""Commands `svd-export check` and `svd-export tensorrt`: arguments in, progress and exit codes out."""

from __future__ import annotations

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
    bundle: Annotated[Path, typer.Argument(help="The bundle; it is only read.")],
    tensorrt: Annotated[Version, typer.Option(help="Whose operators, types and opsets.")] = Version.v11,
) -> None:
    """Holds a bundle's graphs against what TensorRT takes; needs no TensorRT and no GPU."""
    from svd_engine.bundle import Bundle
    from svd_engine.errors import ExportError
    from svd_export.forms import OPSETS
    from svd_export.graph_check import check_graph

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
            remedy="Export again with --opset 20, which TensorRT takes from 10.12 on, or use a newer one."
            if opened.manifest.opset > min(OPSETS)
            else "Report this with the versions in the manifest.",
        )


def _summary(report: GraphReport) -> str:
    heads = ", ".join(f"{count} of width {width}" for width, count in sorted(report.attentions.items()))
    verdict = f"{len(report.findings)} findings" if report.findings else "fits"
    return f"{verdict}: {report.operators} operators of {report.kinds} kinds, attention {heads or 'none'}"
