"""Command of `svd-bench` about compiled engines: arguments in, exit codes out.  Compiles nothing itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svd_bench.commands.arguments import progress, show_tables

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.command("compiled")
def compiled_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle; it is only read.")],
    target: Annotated[
        str, typer.Option(help="Kind of card to compile for: sm75, sm86, sm89, sm120.")
    ] = "sm89",
    network: Annotated[
        list[str] | None,
        typer.Option(
            help="image_encoder, vae_encoder, denoiser, shallow_denoiser, vae_decoder, decoder_segment; "
            "default all. Repeatable."
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another bundle, or a document of it: show what changed.")
    ] = None,
    ladder: Annotated[
        bool,
        typer.Option(
            "--ladder",
            help="Add the exact rewrites one at a time to what the bundle was made from; "
            "compile every rung (minutes each at full size). With --out each rung is written as it is "
            "compiled; the same command resumes an interrupted ladder, on the same commit without changes.",
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option(help="Tables as Markdown.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for compiled.json and compiled.svg; with --ladder for ladder.json."),
    ] = None,
) -> None:
    """Counts what TensorRT's compiler makes of a bundle: kernels, memory traffic, memory.  Needs no GPU."""
    if ladder and against is not None:
        raise typer.BadParameter("--against compares bundles as they are: leave out --ladder")

    from svd_bench.compiled.compile_bundle import compile_bundle, keys_of
    from svd_bench.compiled.document import (
        changes_table,
        check_common,
        compiled_tables,
        ladder_table,
        read_compiled,
    )
    from svd_bench.compiled.ladder import compile_ladder
    from svd_bench.documents.recorder import out_folder
    from svd_bench.report import plots
    from svd_engine.cli import console
    from svd_engine.spec.tables import NETWORKS
    from svd_engine.values import one_of

    wanted = network or None  # all
    for name in network or ():
        one_of("network", name, NETWORKS)
    if out is not None:
        out_folder(out)
    if ladder:
        path = None if out is None else out / "ladder.json"
        document = compile_ladder(bundle, target, wanted, progress(), path)
        show_tables([ladder_table(document)], markdown)
        typer.echo(document.model_dump_json())
        return
    other = read_compiled(against) if against is not None and against.is_file() else None
    if against is not None:  # refused before minutes are spent
        before = [n.network for n in other.networks] if other else keys_of(against, wanted)
        check_common(before, keys_of(bundle, wanted))
    document = compile_bundle(bundle, target, wanted, progress())
    text = document.model_dump_json()
    shown = compiled_tables(document)
    if against is not None:
        shown.append(changes_table(other or compile_bundle(against, target, wanted, progress()), document))
    show_tables(shown, markdown)
    typer.echo(text)
    if out is not None:
        console.write_text(out / "compiled.json", text + "\n")
        console.write_text(out / "compiled.svg", plots.compiled(document))


@app.command("forms")
def forms_command(
    bundle: Annotated[Path, typer.Argument(help="The bundle; it is only read.")],
    target: Annotated[
        str, typer.Option(help="Kind of card to compile for: sm75, sm86, sm89, sm120.")
    ] = "sm89",
    network: Annotated[str, typer.Option(help="denoiser or vae_decoder.")] = "denoiser",
    markdown: Annotated[bool, typer.Option(help="Table as Markdown.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for forms-NETWORK.json.")] = None,
) -> None:
    """Compiles the candidates for the form of a network's graph: normalisations and attention."""
    from svd_bench.compiled.compile_bundle import compile_forms
    from svd_bench.compiled.document import networks_table
    from svd_bench.documents.recorder import out_folder
    from svd_engine.cli import console
    from svd_engine.values import one_of

    one_of("network", network, ("denoiser", "vae_decoder"))
    if out is not None:
        out_folder(out)
    document = compile_forms(bundle, target, network, progress())
    show_tables([networks_table(document)], markdown)
    text = document.model_dump_json()
    typer.echo(text)
    if out is not None:
        console.write_text(out / f"forms-{network}.json", text + "\n")
