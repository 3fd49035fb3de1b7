"""Commands of `svd-bench` about results: tiers, report, compare.  Arguments in, exit codes out."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svd_bench.commands.arguments import command_line, names, show_tables
from svd_engine.cli.options import Variant

if TYPE_CHECKING:
    from svd_bench.documents.results import Results
    from svd_bench.memory.plans import Ways
    from svd_engine.checkpoint.opening import Checkpoint

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


class FullSizeFamily(StrEnum):
    svd = "svd"
    svd_xt = "svd-xt"


@app.command("tiers")
def tiers_command(
    measured: Annotated[
        Path | None, typer.Option(help="Results of svd-engine on a GPU, to predict with their efficiency.")
    ] = None,
    compiled: Annotated[
        list[Path] | None,
        typer.Option(
            help="Document of `svd-bench compiled` to predict from; default those of SVD-XT that come with "
            "svd-bench. Repeatable, for other targets and models."
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Predictions and plans as Markdown tables.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a video.")] = 25,
    without_guidance: Annotated[
        bool,
        typer.Option(
            "--without-guidance",
            help="Predict videos without guidance, half the work of a step, as few-step models take it.",
        ),
    ] = False,
    plans: Annotated[
        bool,
        typer.Option(
            "--plans",
            help="Show in place of predictions how SVD and SVD-XT run on cards from 6 to 141 GB. Counts "
            "networks for two minutes.",
        ),
    ] = False,
    run: Annotated[
        bool,
        typer.Option("--run", help="Measure under emulated memory tiers on this GPU, instead of predicting."),
    ] = False,
    device: Annotated[str, typer.Option(help="With --run: GPU to use, cuda or cuda:N.")] = "cuda",
    random_weights: Annotated[
        FullSizeFamily | None,
        typer.Option(help="With --run: architecture to measure with seeded random weights."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="With --run: checkpoint, svd, svd-xt, svd-xt-1-1, a diffusers folder, a file, or a hub id."
        ),
    ] = None,
    variant: Variant = None,
    tiers: Annotated[
        str,
        typer.Option(help="With --run: tiers in GiB, such as 8,12,16; default all smaller than this GPU."),
    ] = "",
    backends: Annotated[
        str, typer.Option(help="With --run: backends, eager and compiled; default both.")
    ] = "",
    frames: Annotated[
        str, typer.Option(help="With --run: numbers of frames, such as 14,25; default the checkpoint's own.")
    ] = "",
    repeat: Annotated[int, typer.Option(min=1, help="With --run: timed videos, after one to warm up.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder: with --run for tiers.json, updated after each attempt; with --plans for plans.json."
        ),
    ] = None,
) -> None:
    """List GPUs by memory tier with latencies predicted from compiled kernels, or measure tiers (--run)."""
    if plans:
        if run or measured or compiled or without_guidance:
            raise typer.BadParameter("--plans goes with --markdown and --out only")
        _plans(markdown, out)
        return
    if not run:
        if any((random_weights, checkpoint, variant, tiers, backends, frames, out)):
            raise typer.BadParameter(
                "without --run there are only --measured, --compiled, --markdown, --steps and "
                "--without-guidance"
            )
        _overview(measured, compiled, markdown, steps, not without_guidance)
        return
    predicting = measured or compiled or markdown or without_guidance
    if (random_weights is None) == (checkpoint is None) or predicting:
        raise typer.BadParameter(
            "with --run pass --random-weights or --checkpoint, and no --measured, --compiled, --markdown or "
            "--without-guidance"
        )
    if variant and checkpoint is None:
        raise typer.BadParameter("--variant belongs to --checkpoint")
    counts = names(frames)
    if not all(count.isdecimal() and int(count) for count in counts):
        raise typer.BadParameter("--frames must be numbers of at least 1, such as 14,25")
    source = f"random:{random_weights.value}" if random_weights else checkpoint or ""
    _emulate(
        source, variant, device, names(tiers), names(backends), [int(c) for c in counts], steps, repeat, out
    )


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="JSON documents written by svd-bench.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for report.md, report.html and plots/.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(help="Markdown file whose <!-- results:NAME --> parts to update.")
    ] = None,
) -> None:
    """Render RESULTS as tables and plots, one section per machine and setting."""
    if output is None and readme is None:
        raise typer.BadParameter("pass --output FOLDER, --readme FILE, or both")

    from svd_bench.documents.results import read_results

    documents = [(path.stem, read_results(path)) for path in results]
    if readme is not None:
        _render(readme, documents)
    if output is not None:
        from svd_bench.report import pages

        pages.write(pages.page(documents), output)
        typer.echo(f"wrote {output / 'report.md'} and {output / 'report.html'}")


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="Results before the change.")],
    new: Annotated[Path, typer.Argument(help="Results after the change.")],
    threshold: Annotated[
        float, typer.Option(help="Smallest relative change in latency or memory that counts; 0.05 is 5 %.")
    ] = 0.05,
) -> None:
    """Compare two results; exit with code 1 on a regression beyond noise."""
    from svd_bench.documents.results import read_results
    from svd_bench.report import compare as comparing

    comparison = comparing.compare(read_results(old), read_results(new), threshold)
    typer.echo(comparing.comparison_table(comparison).text())
    count = len(comparison.regressions)
    typer.echo(f"{count} of {len(comparison.changes)} got worse by more than {threshold:.3g}, beyond noise")
    if count:
        raise typer.Exit(1)


def _overview(
    measured: Path | None, compiled: list[Path] | None, markdown: bool, steps: int, guidance: bool
) -> None:
    from svd_bench.cards import predict
    from svd_bench.cards.overview import overview
    from svd_bench.compiled.document import read_compiled
    from svd_bench.compiled.whole_video import committed_videos, whole_video
    from svd_bench.documents.results import read_results

    def videos_of(guidance: bool) -> list[predict.CompiledVideo]:
        if compiled:
            return [whole_video(read_compiled(path), guidance) for path in compiled]
        return committed_videos(guidance)

    videos = videos_of(guidance)
    efficiency = None if measured is None else predict.of_measured(read_results(measured), videos_of(True))
    show_tables(overview(videos, efficiency, steps), markdown)


def ways_of_committed(checkpoint: Checkpoint) -> list[Ways]:
    """On each compiler and target whose figures of the checkpoint's networks are committed.

    Those of cards for which that compiler is not the one to choose stand in for others in predictions only.
    """
    from svd_bench.compiled.costs import DocumentCosts
    from svd_bench.compiled.whole_video import committed, committed_streamed, whole_video
    from svd_bench.memory.plans import ways_of_compiled
    from svd_engine.bundle.flavours import TENSORRT_RTX, sm
    from svd_engine.checkpoint.configs import vae_levels

    model, made = checkpoint.model, []
    chosen = {sm(capability) for capability in TENSORRT_RTX.preferred}
    for document in (d for d in committed() if d.model == model.name and d.target in chosen):
        engine = f"{document.compiler.rpartition(' ')[0]}, {document.target}"
        alike = (document.model, document.target)
        streamed = [other for other in committed_streamed() if (other.model, other.target) == alike]
        cost_of = DocumentCosts([document, *streamed], vae_levels(checkpoint.configs))
        made.append(ways_of_compiled(model, engine, cost_of, whole_video(document), cost_of.slices))
    return made


def _plans(markdown: bool, out: Path | None) -> None:
    from svd_bench.documents.recorder import out_folder
    from svd_bench.memory.plans import plans_document, plans_table, ways_of_torch
    from svd_engine.checkpoint.opening import random_checkpoint
    from svd_engine.cli import console

    folder = None if out is None else out_folder(out)
    all_ways = []
    for family in FullSizeFamily:
        checkpoint = random_checkpoint(family.value)
        all_ways += [*ways_of_committed(checkpoint), ways_of_torch(checkpoint)]
    made = plans_document(all_ways)
    if folder is not None:
        console.write_text(
            folder / "plans.json", made.model_dump_json(indent=1, exclude_defaults=True) + "\n"
        )
    show_tables([plans_table(made)], markdown)


def _emulate(
    source: str,
    variant: str | None,
    device: str,
    names: list[str],
    backends: list[str],
    frames: list[int],
    steps: int,
    repeat: int,
    out: Path | None,
) -> None:
    """Progress on stderr, the table and then one JSON line on stdout; exit code 1 when an attempt broke."""
    from svd_bench.memory import emulate

    chosen = emulate.smaller_tiers(emulate.device_memory(device), names)
    using = emulate.torch_backends(backends)

    from svd_bench.documents.recorder import Recorder, out_folder
    from svd_bench.measuring.environment import environment
    from svd_bench.measuring.nvml import open_gpu
    from svd_bench.subjects.cases import checkpoint_of
    from svd_engine.backends.choose import resolve

    where, model = resolve(device), checkpoint_of(source, variant).model
    gpu, without = open_gpu(where)
    path = None if out is None else out_folder(out) / "tiers.json"
    recorder = Recorder("tiers", environment(where, gpu, command_line()), path)
    recorder.warn(without)
    base = emulate.base_attempt(source, str(where), model, steps, repeat, variant)
    tried = []
    for one in emulate.try_tiers(base, chosen, using, frames or [model.frames], emulate.in_subprocess):
        typer.echo(str(one), err=True)
        tried.append(one)
        emulate.record_result(recorder, one, model)
    typer.echo(emulate.tiers_table(tried, recorder.environment.device).text())
    typer.echo(recorder.results().model_dump_json())
    if any(one.answer.failed for one in tried):
        raise typer.Exit(1)


def _render(path: Path, documents: list[tuple[str, Results]]) -> None:
    from svd_bench.report.readme import render
    from svd_engine.cli import console
    from svd_engine.errors import SettingsError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--readme {path}",
            expected="a text that can be read",
            got=str(error),
            remedy="Pass the path of the Markdown file that holds the markers.",
        ) from error
    console.write_text(path, render(text, dict(documents)))
    typer.echo(f"wrote {path}")
