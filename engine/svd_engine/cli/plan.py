"""Command `svd-engine plan`: how a video would be made within a memory budget."""

from __future__ import annotations

from typing import Annotated

import typer

from svd_engine.backends.registry import NAMES
from svd_engine.cli.options import (
    DecodingOption,
    DevicesOption,
    DTypeOption,
    ReuseBranch,
    ReuseOption,
    devices_of,
    integer,
    memory_of,
)


def plan(
    source: Annotated[str, typer.Argument(help="Bundle's folder, or checkpoint as generate takes it.")],
    memory: Annotated[
        str,
        typer.Option(
            metavar="[auto|none|8GiB|0.9]",
            help="Memory budget: 8GiB, 0.9 (of all), auto (what is free) or none, to show how a call runs "
            "without one.",
        ),
    ] = "auto",
    backend: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(NAMES)}]", help="Backend to plan for; auto is the usual one.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Device to plan for: auto, cpu, cuda or cuda:N, which need not be here.")
    ] = "auto",
    devices: DevicesOption = None,
    dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of a checkpoint; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DTypeOption.auto,
    frames: Annotated[int | None, typer.Option(help="Number of frames.", parser=integer)] = None,
    height: Annotated[int | None, typer.Option(help="Height of the video (pixels).", parser=integer)] = None,
    width: Annotated[int | None, typer.Option(help="Width of the video (pixels).", parser=integer)] = None,
    decoding: Annotated[
        DecodingOption, typer.Option(help="Decoding to plan for, as of generate.")
    ] = DecodingOption.auto,
    decode_chunk_size: Annotated[
        int | None, typer.Option(help="Frames decoded at once.", parser=integer)
    ] = None,
    num_videos: Annotated[int, typer.Option(help="Videos of each photograph.", parser=integer)] = 1,
    swap_networks: Annotated[
        bool, typer.Option("--swap-networks", help="Keep one network in memory at a time.")
    ] = False,
    reuse: ReuseOption = None,
    reuse_branch: ReuseBranch = None,
    every: Annotated[bool, typer.Option("--all", help="Show every plan that was considered.")] = False,
) -> None:
    """Show how a video of SOURCE would be made within a memory budget; reads no weights and runs nothing."""
    if reuse is None and reuse_branch is not None:
        raise typer.BadParameter("--reuse-branch belongs to --reuse N")

    from svd_engine import planned
    from svd_engine.spec.reuse import Reuse

    call = {
        "frames": frames, "height": height, "width": width, "decoding": decoding.value,
        "decode_chunk_size": decode_chunk_size, "videos_per_image": num_videos,
    }  # fmt: skip
    asked = {name: value for name, value in call.items() if value is not None}
    limit = memory_of(memory)
    planner, settings = planned.planner_of(
        source, limit, backend, device, dtype.value, swap_networks, asked,
        None if reuse is None else Reuse(reuse, reuse_branch), devices_of(devices),
    )  # fmt: skip
    if every:
        typer.echo(planned.comparison(planner, planner.considered(settings, num_videos)))
        for reason in planner.left_out(settings, num_videos):
            typer.echo(f"not considered: {reason}")
    choose = planner.unplanned if limit is None else planner.choose
    typer.echo(planned.table(planner, choose(settings, num_videos)))
