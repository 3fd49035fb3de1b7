"""The rules that keep the layout: who may import whom, what costs nothing to import, what ships."""

from __future__ import annotations

import ast
import re
import zipfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ENGINE = ROOT / "engine" / "svd_engine"
PACKAGES = {
    "svd_engine": ENGINE,
    "svd_export": ROOT / "export/svd_export",
    "svd_bench": ROOT / "benchmarks/svd_bench",
}
NETWORK_LIBRARIES = {"torch", "diffusers", "transformers"}
RUNTIMES = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy"}
FILES = {"pathlib", "os", "shutil", "json", "safetensors", "huggingface_hub"}
BACKENDS = {f"svd_engine.backends.{name}" for name in ("torch", "onnxruntime", "tensorrt")}

# From the ground up: each knows those above it in this list, and of its own row only what its file says.
LAYERS: tuple[set[str], ...] = (
    {"_version", "errors", "shell", "host_memory", "torch_state", "observer", "py.typed", "assets"},
    {"install", "values", "arguments", "call_queue", "clock", "spec"},
    {"request", "sampling", "media", "steering", "image_conditioning"},
    {"report", "checkpoint", "bundle"},
    {"output", "networks", "text_to_image"},
    {"backends"},
    {"residency"},
    {"guidance_parallel"},
    {"pipeline", "unsupported", "info", "planned"},
    {"engine"},
    {"continuing", "opening"},
    {"serving", "cli", "__init__"},
)

BENCH_LAYERS: tuple[set[str], ...] = (
    {"py.typed", "results", "documents"},
    {"measuring", "cards"},
    {"subjects"},
    {"memory", "compiled", "quality"},
    {"contest", "report"},
    {"gpu"},
    {"commands"},
    {"cli"},
    {"gpu_check", "__init__"},
)
LAYERS_OF = {"svd_engine": LAYERS, "svd_bench": BENCH_LAYERS}

# module (or folder) -> what it must not import, anywhere in the file
MUST_NOT_KNOW: dict[str, set[str]] = {
    "values.py": {*NETWORK_LIBRARIES, *RUNTIMES},
    "request.py": {"typer", "pydantic", "numpy", *NETWORK_LIBRARIES, *RUNTIMES, *FILES},
    "sampling/": {"PIL", "diffusers", *RUNTIMES, *FILES},
    "media/": {"diffusers", "transformers", *RUNTIMES},
    "pipeline.py": {"svd_engine.backends", "typer", "diffusers", "transformers", "PIL", *RUNTIMES, *FILES},
    "spec/tables.py": {*NETWORK_LIBRARIES, *RUNTIMES, *FILES},
    "spec/": {"diffusers", "transformers", *RUNTIMES},
    "networks/": {*RUNTIMES},
    "networks/rewrites/": {"svd_engine.checkpoint", *RUNTIMES, *FILES},
    "checkpoint/": {*RUNTIMES},
    "bundle/": {"onnxruntime", "tensorrt", *NETWORK_LIBRARIES},
    "bundle/flavours.py": {*RUNTIMES, *FILES},
    "backends/fake.py": {*BACKENDS, *RUNTIMES, "diffusers"},
    "backends/torch/": {*BACKENDS - {"svd_engine.backends.torch"}, *RUNTIMES},
    "backends/onnxruntime.py": {*BACKENDS, "svd_engine.checkpoint", "tensorrt"},
    "backends/tensorrt/": {
        *BACKENDS - {"svd_engine.backends.tensorrt"}, "svd_engine.checkpoint", "onnxruntime",
    },
    "backends/tensorrt/jit_cache.py": {*NETWORK_LIBRARIES, *RUNTIMES},
    "engine.py": {*BACKENDS, "typer", "rich", *RUNTIMES},
    "continuing.py": {"svd_engine.backends", "svd_engine.pipeline", "typer", "rich", *RUNTIMES},
    "residency/": {"typer", "rich", *RUNTIMES},
    "cli/": {*RUNTIMES, "numpy"},
    "observer.py": {*NETWORK_LIBRARIES, *RUNTIMES},
    "serving/": {*BACKENDS, "svd_engine.pipeline", "typer", "rich", "diffusers", "transformers", *RUNTIMES},
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Every absolute module name that the file imports at run time, at any depth."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


def known(path: Path, names: set[str]) -> set[str]:
    mine = {i for i in imports(path) for name in names if i == name or i.startswith(f"{name}.")}
    return mine - {module_name(path)}


def module_name(path: Path) -> str:
    package = next(folder for folder in PACKAGES.values() if path.is_relative_to(folder))
    return ".".join(path.relative_to(package.parent).with_suffix("").parts)


@pytest.mark.parametrize("place", MUST_NOT_KNOW)
def test_must_not_know(place: str) -> None:
    target = ENGINE / place
    files = sorted(target.rglob("*.py")) if target.is_dir() else [target]
    assert files
    assert {
        str(f.name): known(f, MUST_NOT_KNOW[place]) for f in files if known(f, MUST_NOT_KNOW[place])
    } == {}


def part(module: str) -> str:
    """The part of its package that a module belongs to: a folder, or a file at the top."""
    return module.split(".")[1] if "." in module else "__init__"


def arrows(package: str) -> set[tuple[str, str]]:
    """(module, module that it imports), both of the package."""
    folder = PACKAGES[package]
    modules = {module_name(path).removesuffix(".__init__"): path for path in folder.rglob("*.py")}
    return {
        (name, imported)
        for name, path in modules.items()
        for imported in known(path, {package}) & modules.keys() - {package, name}
    }


@pytest.mark.parametrize("package", LAYERS_OF)
def test_every_part_has_a_layer(package: str) -> None:
    parts = {path.name.removesuffix(".py") for path in PACKAGES[package].iterdir()} - {"__pycache__"}
    assert set().union(*LAYERS_OF[package]) == parts


@pytest.mark.parametrize("package", LAYERS_OF)
def test_what_is_below_knows_nothing_of_what_is_above(package: str) -> None:
    level = {name: number for number, layer in enumerate(LAYERS_OF[package]) for name in layer}
    assert {(a, b) for a, b in arrows(package) if level[part(b)] > level[part(a)]} == set()


@pytest.mark.parametrize("package", LAYERS_OF)
def test_no_two_parts_know_each_other(package: str) -> None:
    between = {(part(a), part(b)) for a, b in arrows(package)}
    assert {pair for pair in between if pair[0] != pair[1] and pair[::-1] in between} == set()


def test_the_benchmark_imports_in_no_circle() -> None:
    """Neither its modules nor its sub-packages, imports inside functions included."""
    modules: dict[str, set[str]] = {}
    folders: dict[str, set[str]] = {}
    for a, b in arrows("svd_bench"):
        if PACKAGES["svd_bench"].joinpath(*b.split(".")[1:]).is_dir():
            continue  # `from svd_bench.report import views` names the folder beside the module
        modules.setdefault(a, set()).add(b)
        if part(a) != part(b):
            folders.setdefault(part(a), set()).add(part(b))
    for graph in (modules, folders):
        assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_a_front_knows_the_service_and_not_the_other_way_round() -> None:
    """Nothing below `serving` imports it, and nothing of it but a front knows that front's protocol.

    The command line stands beside it, and starts fronts.
    """
    fronts = {"serving", "cli"}
    below = [f for f in ENGINE.rglob("*.py") if f.relative_to(ENGINE).parts[0] not in fronts]
    assert {f.name: known(f, {"svd_engine.serving"}) for f in below if known(f, {"svd_engine.serving"})} == {}
    protocol = {"svd_engine.serving.triton", "triton_python_backend_utils", "tritonclient"}
    protocol |= {"svd_engine.serving.web", "gradio", "svd_engine.serving.batch", "ray"}
    service = (ENGINE / "serving").glob("*.py")
    assert {f.name: known(f, protocol) for f in service if known(f, protocol)} == {}


def test_the_engine_stands_alone() -> None:
    others = {"svd_export", "svd_bench"}
    assert {f.name: known(f, others) for f in ENGINE.rglob("*.py") if known(f, others)} == {}


def test_the_exporter_does_not_measure() -> None:
    files = PACKAGES["svd_export"].rglob("*.py")
    assert {f.name: known(f, {"svd_bench"}) for f in files if known(f, {"svd_bench"})} == {}


def names_of(path: Path) -> set[str]:
    """The classes, types and constants that a module makes."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found.update(target.id for target in targets if isinstance(target, ast.Name))
    return {name for name in found if name[0].isupper()}


def test_no_name_means_two_things() -> None:
    """Among what the engine and the exporter define; the benchmarks have words of their own."""
    files = [f for package in ("svd_engine", "svd_export") for f in PACKAGES[package].rglob("*.py")]
    made = Counter(name for file in files for name in names_of(file))
    assert {name for name, count in made.items() if count > 1} == set()


def test_commits_are_checked_as_make_lint_does() -> None:
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert " && ".join(hooks).replace(".venv/bin", "$(BIN)") in (ROOT / "Makefile").read_text()


def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path) -> None:
    """Packages, py.typed, the photograph, the compiled figures that predictions rest on; no tests, no other
    results, no bytecode."""
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    sources = {
        str(f.relative_to(folder.parent)) for folder in PACKAGES.values() for f in folder.rglob("*.py")
    }
    assert sources <= names
    assert {"svd_engine/assets/coffee.png", "svd_engine/serving/web/page.css"} <= names
    demo = ROOT / "engine/svd_engine/assets/demo"
    assert {str(f.relative_to(ROOT / "engine")) for f in demo.rglob("*") if f.is_file()} <= names
    compiled = {name for name in names if name.startswith("svd_bench/results/compiled/")}
    assert compiled
    others = names - compiled
    assert not {name for name in others if name.endswith(".pyc") or "/test" in name or "results/" in name}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert all(command in text for command in ("svd-engine", "svd-export", "svd-bench"))
