"""The command `svd-engine serve`: a web page over one or several bundles and checkpoints."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer

from svd_engine.backends.registry import NAMES, check_name
from svd_engine.cli import console
from svd_engine.cli.options import DTypeOption, MemoryOption, integer, memory_of


def serve(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE|CHECKPOINT...",
            help="Models to offer: bundles' folders, or checkpoints as generate takes them.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", parser=integer)] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(
            metavar="USER:PASSWORD",
            envvar="SVD_ENGINE_AUTH",
            help="Ask visitors for these. Other users of this machine can read a command line: better set "
            "the variable.",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(help="Videos that may wait beside the running one.", parser=integer)
    ] = 8,
    backend: Annotated[
        str, typer.Option(metavar=f"[{'|'.join(NAMES)}]", help="Backend to run on; auto chooses.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        DTypeOption, typer.Option(help="Precision of checkpoints; auto is fp16 on a GPU, fp32 on a CPU.")
    ] = DTypeOption.auto,
    swap_networks: Annotated[
        bool, typer.Option("--swap-networks", help="Keep one network in memory at a time.")
    ] = False,
    memory: MemoryOption = "auto",
) -> None:
    """Serve a web page that makes videos: photograph in, progress and previews, mp4 out."""
    check_name(backend)
    console.show_notices()

    from svd_engine.serving.web import server
    from svd_engine.serving.web.models import open_models

    credentials = server.read_credentials(auth) if auth is not None else None
    server.check_installed()
    port = server.free_port(host, port)
    if server.listens_wide(host) and credentials is None:
        typer.echo(
            f"warning: whoever reaches this machine at {host} can make videos here: set --auth user:password",
            err=True,
        )
    models = open_models(
        sources, backend=backend, device=device, dtype=dtype.value, swap_networks=swap_networks,
        memory=memory_of(memory),
    )  # fmt: skip
    page = server.WebServer(models, host=host, port=port, credentials=credentials, max_queue=queue)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    try:
        typer.echo(f"{', '.join(models)} at {page.url}  (Ctrl-C stops it)")
        while True:
            time.sleep(3600)  # which Ctrl-C ends on Windows too, unlike a wait
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)
    finally:
        page.close()
