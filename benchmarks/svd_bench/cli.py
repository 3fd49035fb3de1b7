"""Command `svd-bench`: its groups of commands, and errors as exit codes."""

from __future__ import annotations

import typer

from svd_bench.commands import compiled, gpu, measure, quality, results
from svd_engine.cli import console
from svd_engine.cli.options import VersionFlag

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def root(version: VersionFlag = False) -> None:
    """Measure speed, memory and quality of Stable Video Diffusion on this machine."""


for group in (measure, gpu, results, compiled, quality):  # as --help lists them
    app.registered_commands += group.app.registered_commands


def main() -> None:
    console.run(app, console.OPTIONS | {"backend": "--backends"})


if __name__ == "__main__":
    main()
