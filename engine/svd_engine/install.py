"""The command that installs what an extra of pyproject.toml names: one that works here.

No index has svd-engine, so the line for an installed wheel names the packages themselves.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from svd_engine.shell import quoted

CHECKOUT = Path(__file__).resolve().parents[2]


def install_line(extra: str) -> str:
    """`pip install ...` of an extra of pyproject.toml: "cpu", "cuda", "tensorrt", "bench", "ray" ..."""
    if (CHECKOUT / "pyproject.toml").is_file():
        return f"pip install -e {quoted(f'{CHECKOUT}[{extra}]')}"
    try:
        listed = [line.partition(";") for line in requires("svd-engine") or ()]
    except PackageNotFoundError:  # copied, not installed
        return f"pip install {quoted(f'CHECKOUT[{extra}]')}"
    wanted = [name.strip() for name, _, when in listed if when.split() == ["extra", "==", f'"{extra}"']]
    return f"pip install {' '.join(map(quoted, wanted))}"
