"""Command gpu-check: arguments in, exit codes out.  Checks nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svd_bench.commands.arguments import command_line, names

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.command("gpu-check")
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for gpu-check.json, updated after each stage.")],
    device: Annotated[str, typer.Option(help="GPU to check: auto, cuda or cuda:N.")] = "auto",
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run the stages on tiny networks on the CPU, without a GPU.")
    ] = False,
    limit_s: Annotated[float, typer.Option(help="Stop after this many seconds.")] = 540.0,
    only: Annotated[
        str, typer.Option(help="Stages to run after the first, by their names in the summary; default all.")
    ] = "",
) -> None:
    """Check every CUDA path and measure this GPU within minutes, the most valuable stages first.

    Exit with code 1 without a GPU, or if a stage failed.
    """
    if rehearse and device not in ("auto", "cpu"):
        raise typer.BadParameter("--rehearse runs on the CPU: leave --device out")

    from svd_bench.gpu.check import check_gpu

    raise SystemExit(check_gpu(out, device, limit_s, names(only), command_line(), rehearse=rehearse))
