"""What costs seconds to import is imported when it is used: not for `import svd_engine`, not for --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {
    "av", "diffusers", "gradio", "huggingface_hub", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
    "PIL", "polygraphy", "pyarrow", "ray", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "transformers",
    "tritonclient",
}  # fmt: skip

SCRIPT = """
import json, sys
sys.argv = ["command", *sys.argv[1:]]
try:
    {statement}
except SystemExit as done:
    assert not done.code, done.code
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""

STATEMENTS = {
    "import svd_engine": ("import svd_engine", ()),
    "its version": ("import svd_engine; svd_engine.__version__", ()),
    "svd-engine": ("from svd_engine.cli.main import main; main()", ("--help",)),
    "svd-engine generate": ("from svd_engine.cli.main import main; main()", ("generate", "--help")),
    "svd-engine batch": ("from svd_engine.cli.main import main; main()", ("batch", "--help")),
    "svd-engine info": ("from svd_engine.cli.main import main; main()", ("info", "--help")),
    "svd-engine serve": ("from svd_engine.cli.main import main; main()", ("serve", "--help")),
    "svd-engine --version": ("from svd_engine.cli.main import main; main()", ("--version",)),
    "svd-export": ("from svd_export.cli import main; main()", ("--help",)),
    "svd-export onnx": ("from svd_export.cli import main; main()", ("onnx", "--help")),
    "svd-bench": ("from svd_bench.cli import main; main()", ("--help",)),
    "svd-export verify": ("from svd_export.cli import main; main()", ("verify", "--help")),
    "svd-export check": ("from svd_export.cli import main; main()", ("check", "--help")),
    "svd-export tensorrt": ("from svd_export.cli import main; main()", ("tensorrt", "--help")),
    "svd-export triton": ("from svd_export.cli import main; main()", ("triton", "--help")),
}


@pytest.mark.parametrize(("statement", "arguments"), STATEMENTS.values(), ids=STATEMENTS)
def test_nothing_heavy_is_imported(statement: str, arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement=statement), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    *shown, loaded = done.stdout.splitlines()
    assert set(json.loads(loaded)) & HEAVY == set()
    assert bool(shown) == bool(arguments)  # the help was really printed


def test_public_names_are_complete_and_there() -> None:
    import svd_engine
    from svd_engine import errors

    raised = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert raised <= set(svd_engine.__all__)
    assert all(getattr(svd_engine, name) for name in svd_engine.__all__)


def test_the_engine_is_there_when_asked_for() -> None:
    import svd_engine

    assert svd_engine.VideoEngine.__module__ == "svd_engine.engine"
    with pytest.raises(AttributeError, match="module 'svd_engine' has no attribute 'Pipeline'"):
        svd_engine.Pipeline  # noqa: B018
