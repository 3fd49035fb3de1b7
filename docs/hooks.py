"""Hooks of mkdocs.  The site's pages are the repository's own files at their own paths, so that a link works
in both; beside them stand the references, which are made from the code and written nowhere."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from typer.cli import get_docs_for_click

import svd_engine

ROOT = Path(__file__).parents[1]
# what pages show or link to, outside docs/
FILES = (
    "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "LICENSE", "README.md", "SECURITY.md",
    "demo/demo.webp", "engine/svd_engine/assets/coffee.png", "engine/svd_engine/assets/demo/README.md",
    *(f"examples/{path.parent.name}/README.md" for path in ROOT.glob("examples/*/README.md")),
)  # fmt: skip
COMMANDS = {"svd-engine": "svd_engine.cli.main", "svd-export": "svd_export.cli", "svd-bench": "svd_bench.cli"}
# what users import beside the names of `svd_engine`
MORE_NAMES = (
    "svd_engine.errors", "svd_engine.observer.Observer", "svd_engine.observer.Step",
    "svd_engine.serving.jobs.JobService", "svd_engine.serving.jobs.Job",
    "svd_engine.serving.one_video.VideoRequest", "svd_engine.serving.one_video.Status",
    "svd_engine.serving.watch.Progress",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put files of docs/ where they are in the repository, and add the others and the references."""
    in_docs = [file for file in files if file.src_dir == config.docs_dir]
    for file in in_docs:
        files.remove(file)
    paths = [f"docs/{file.src_uri}" for file in in_docs if file.inclusion is not InclusionLevel.EXCLUDED]
    for path in (*paths, *FILES):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "docs/reference/python.md", content=python_reference()))
    for name in COMMANDS:
        text = command_reference(name)
        files.append(File.generated(config, f"docs/reference/{name}.md", content=text))
    return files


def command_reference(name: str) -> str:
    """Every command and option of the program `name`, as its `--help` has them."""
    program = typer.main.get_command(import_module(COMMANDS[name]).app)
    return get_docs_for_click(obj=program, ctx=typer.Context(program, info_name=name), name=name)


def python_reference() -> str:
    """What mkdocstrings fills in: the names that `svd_engine` lists, its errors as one module, and others."""
    apart = {"__version__", *vars(import_module("svd_engine.errors"))}
    names = [f"svd_engine.{name}" for name in svd_engine.__all__ if name not in apart]
    return "\n\n".join(["# Python reference", *(f"::: {name}" for name in (*names, *MORE_NAMES))]) + "\n"
