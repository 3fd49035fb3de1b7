"""What the instructions say is true: of a checkout, and of a wheel in an environment that has no checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement  # pytest needs it, too

from svd_engine import install
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.install import install_line
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
IN_THE_WHEEL = ("svd_engine/assets/coffee.png", "svd_engine/assets/demo/model_index.json")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel.  What it depends on lies in this test's own
    environment, which the new one may import from: it would take minutes and gigabytes to install anew."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel], check=True, capture_output=True, env=without_checkout())
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))  # no .pth of its own is read
    return venv / "bin"


def without_checkout() -> dict[str, str]:
    """The environment, with nothing in it that leads an import to the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1"}


def run(command: Path, *arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [command, *map(str, arguments)], env=without_checkout(), cwd=cwd,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


DEMO = "import svd_engine; print(svd_engine.__file__)"
DEMO += "; from svd_engine.checkpoint.opening import open_checkpoint; print(open_checkpoint('demo').digest())"


def test_the_demo_from_a_wheel(installed: Path, smallest_checkpoint: Path, tmp_path: Path) -> None:
    """Photograph, checkpoint and commands come from the wheel; what is exported is small."""
    where, digest = run(installed / "python", "-c", DEMO, cwd=tmp_path).split()
    assert digest == open_checkpoint("demo").digest()
    photograph = Path(where).parent / "assets/coffee.png"
    assert photograph.is_relative_to(installed.parent)
    size = ("--frames", 2, "--height", 32, "--width", 32)
    run(installed / "svd-export", "onnx", smallest_checkpoint, "-o", "bundle", *size, cwd=tmp_path)
    made = ("-o", "demo.mp4", "-o", "demo.png", "--report", "demo.json", "--steps", 2)
    run(installed / "svd-engine", "generate", photograph, "--bundle", "bundle", *made, cwd=tmp_path)
    assert {"demo.mp4", "demo.png", "demo.json"} <= {path.name for path in tmp_path.iterdir()}
    assert "tiers" in run(installed / "svd-bench", "--help", cwd=tmp_path)


@pytest.mark.parametrize("extra", sorted(EXTRAS.keys() - {"dev"}))
def test_the_line_in_a_wheel_names_the_packages(installed: Path, tmp_path: Path, extra: str) -> None:
    script = f"from svd_engine.install import install_line; print(install_line({extra!r}))"
    line = run(installed / "python", "-c", script, cwd=tmp_path).strip()
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    pip, command, *packages = words.stdout.split()
    assert (pip, command) == ("pip", "install")
    assert set(map(Requirement, packages)) == set(map(Requirement, EXTRAS[extra]))


def test_the_line_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert install_line("cuda") == f"pip install -e '{ROOT}[cuda]'"


def test_the_line_of_a_copy_without_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install, "CHECKOUT", tmp_path)
    monkeypatch.setattr(install, "requires", missing)
    assert install_line("cuda") == "pip install 'CHECKOUT[cuda]'"


@pytest.mark.parametrize("what", ["checkout", "wheel"])
def test_pip_finds_all_that_it_needs(wheel: Path, what: str) -> None:
    """Nothing but this environment's packages: what is not listed anywhere would be looked for in vain."""
    target = wheel if what == "wheel" else ROOT
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, f"{target}[cpu,export,bench,triton,docs]"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "onnxscript" in done.stdout


def test_the_wheel_says_what_pyproject_says(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    assert set(IN_THE_WHEEL) <= set(archive.namelist())
    (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    said = Parser().parsestr(archive.read(path).decode())
    assert set(said.get_all("Provides-Extra", ())) == EXTRAS.keys()
    needed = {line for line in said.get_all("Requires-Dist", ()) if "extra ==" not in line}
    assert needed == set(PROJECT["dependencies"])
    assert said.get_all("Classifier") == PROJECT["classifiers"]


def test_what_is_imported_is_listed() -> None:
    """Every import of ours, wherever it stands, is of a package that pyproject.toml names."""
    lines = [line for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group]
    listed = {distribution(line) for line in lines}
    brings = metadata.packages_distributions()
    folders = ("engine", "export", "benchmarks/svd_bench")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    names: set[str] = set().union(*map(imported, files)) - set(sys.stdlib_module_names)
    missing = {name for name in names if not listed & {distribution(d) for d in brings.get(name, [name])}}
    # protobuf comes with onnx; a Triton server brings its own module
    assert missing - {"svd_engine", "svd_export", "svd_bench"} <= {"google", "triton_python_backend_utils"}


def distribution(requirement: str) -> str:
    """The normalised name in a requirement."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")


def imported(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "examples/training/README.md",
        *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_no_page_installs_from_an_index_that_has_it_not(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.search(r"pip install[^\n]*svd-engine", text)
    for extras in re.findall(r"pip install[^\n]*'[^'\n]*[./a-z]\[([\w,-]+)\]'", text):
        assert set(extras.split(",")) <= {*EXTRAS, "http", "grpc"}  # the last two of tritonclient


def test_no_message_installs_from_an_index_that_has_it_not() -> None:
    files = [file for folder in ("engine", "export", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if re.search(r"svd-engine\[", file.read_text())] == []


def test_constraints_hold_what_the_extras_need() -> None:
    """For all but CUDA's ONNX Runtime and full TensorRT, which the tests do without."""
    pinned = {distribution(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for extra in ("cpu", "export", "bench", "triton", "ray", "web", "docs", "tensorrt-rtx", "dev"):
        for line in EXTRAS[extra]:
            name = distribution(line)
            assert name in pinned | {"svd-engine"}, line


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    """Not built here: no container runtime.  What it copies exists, and .dockerignore lets it through."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^[A-Z]+", dockerfile, re.MULTILINE) == ["FROM", "ENV", "COPY", "RUN"]
    assert "pip install '/src[cuda]'" in dockerfile
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    assert let_in >= {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    assert let_in >= {"engine", "export", "benchmarks"}
