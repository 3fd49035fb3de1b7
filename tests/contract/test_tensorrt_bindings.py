"""Every name, signature and flag of TensorRT that our code uses exists, in each version that we support.

Held against NVIDIA's own bindings.  No GPU and no TensorRT library: nothing of it is run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo

from tests.contract.bindings import CACHE, RTX, Bindings
from tests.contract.uses import BOTH, GONE, names, probed, sources
from tests.support.paths import ROOT

MISSING = """
import json, operator, sys
import tensorrt
def there(name):
    try:
        return operator.attrgetter(name)(tensorrt) is not NotImplemented
    except AttributeError:
        return False
print(json.dumps([name for name in json.loads(sys.argv[1]) if not there(name)]))
"""
MEMBERS = """
import json, inspect, tensorrt
classes = [kind for _, kind in inspect.getmembers(tensorrt, inspect.isclass)]
print(json.dumps(sorted({name for kind in classes for name in dir(kind) if not name.startswith("_")})))
"""
SETTINGS = """
[mypy]
strict = true
warn_unused_ignores = false
disallow_subclassing_any = false
untyped_calls_exclude = torch, tensorrt, tensorrt_rtx
follow_imports = silent
[mypy-tensorrt.*,tensorrt_rtx.*]
ignore_errors = true
ignore_missing_imports = true
[mypy-torch.*,polygraphy.*,diffusers.*,transformers.*,numpy.*,onnx.*,onnx_ir.*,onnxruntime.*,rich.*,typer.*]
follow_imports = skip
ignore_missing_imports = true
"""
# names that other things have too: there, a type checker may well not know what it looks at
COMMON = {
    name
    for thing in (
        torch,
        torch.Tensor,
        torch.cuda,
        torch.device,
        Path,
        str,
        bytes,
        dict,
        list,
        os,
        onnx.GraphProto(),
        ExternalDataInfo(onnx.TensorProto()),
    )
    for name in dir(thing)
}


def mypy(real: Bindings, *arguments: str) -> str:
    """What mypy says of files, with the types of these bindings."""
    settings = real.folder / "mypy.ini"
    settings.write_text(SETTINGS)
    places = [real.folder / "stubs", *(ROOT / folder for folder in ("engine", "export", "benchmarks"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), "--hide-error-context",
         "--cache-dir", str(CACHE / f"mypy-{real.version}"), *arguments],
        env=os.environ | {"MYPYPATH": os.pathsep.join(map(str, places))},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def missing(real: Bindings, wanted: set[str]) -> list[str]:
    return list(json.loads(real.python(MISSING, json.dumps(sorted(wanted)))))


def test_our_code_uses_tensorrt() -> None:
    """Else what follows would hold nothing."""
    used = {name for path in sources() for name in names(path)}
    assert {path.name for path in sources()} >= {"tensorrt_builder.py", "network.py"}
    assert {
        "Runtime",
        "IProgressMonitor",
        "Refitter",
        "BuilderFlag.TF32",
        "BuilderFlag.REFIT",
        "BuilderFlag.REFIT_IDENTICAL",
    } <= used
    ours = {name for path in sources(BOTH) for name in names(path)}
    assert {"CudaGraphStrategy.WHOLE_GRAPH_CAPTURE", "EngineValidity.INVALID"} <= ours


def test_every_name_is_there(real: Bindings) -> None:
    assert missing(real, {name for path in sources(real.modules) for name in names(path)}) == []


def test_types_and_signatures(real: Bindings) -> None:
    assert mypy(real, *map(str, sources(real.modules))).startswith("Success")


def test_no_use_escapes_the_type_checker(real: Bindings, tmp_path: Path) -> None:
    """An object that mypy takes for Any could be used in any way: annotate it with its class."""
    if real.version == "rtx":
        pytest.xfail("svd_export/compiled.py and backends/tensorrt/jit.py still take some objects for Any")
    members = set(json.loads(real.python(MEMBERS))) - COMMON
    arguments, placed = [], {}
    for path in sources(real.modules):
        text, placed[path.name] = probed(path, members)
        shadow = tmp_path / path.name
        shadow.write_text(text)
        arguments += ["--shadow-file", str(path), str(shadow)]
    said = mypy(real, *arguments, *map(str, sources(real.modules)))
    unseen = {
        name: [p.partition(GONE)[0] for p in probes if f'"{p}"' not in said]
        for name, probes in placed.items()
    }
    assert {name: uses for name, uses in unseen.items() if uses} == {}
    assert sum(map(len, placed.values())) > 20


@pytest.mark.parametrize("use", ["config.set_flag(trt.BuilderFlag.FP16)", "engine.device_memory_size"])
def test_what_version_11_removed_is_found(real: Bindings, tmp_path: Path, use: str) -> None:
    """By the name, by the type checker, or by both; in version 10 it is no mistake."""
    file = tmp_path / "old.py"
    arguments = "config: trt.IBuilderConfig, engine: trt.ICudaEngine"
    file.write_text(f"import tensorrt as trt\n\ndef use({arguments}) -> None:\n    {use}\n")
    removed = real.version.startswith("11.") or real.version == RTX  # which has the API of 11
    assert ("FP16" in str(missing(real, names(file)))) == (removed and "FP16" in use)
    assert ("attr-defined" in mypy(real, str(file))) == removed


def test_no_version_takes_a_wrong_argument(real: Bindings, tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(
        "import tensorrt as trt\n\ndef use(config: trt.IBuilderConfig) -> None:\n"
        "    config.set_memory_pool_limit(trt.BuilderFlag.TF32, 1)\n"
    )
    assert "arg-type" in mypy(real, str(file))
