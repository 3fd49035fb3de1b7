"""The one table of backends.  Imports no backend: a row opens its own when it is asked to.

The command line, `choose`, `info`, svd-bench and messages read it; another backend is a row and a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from svd_engine.bundle.flavours import TENSORRT, TENSORRT_RTX, Flavour
from svd_engine.errors import SettingsError
from svd_engine.install import install_line

if TYPE_CHECKING:
    import torch

    from svd_engine.bundle.reading import Bundle
    from svd_engine.networks.modules import Modules
    from svd_engine.spec.network import Backend

Runs = Literal["checkpoint", "graphs", "plans"]  # torch modules, or what a bundle holds


@dataclass(frozen=True)
class BackendEntry:
    """One backend."""

    name: str
    runs: Runs
    devices: tuple[str, ...]  # kinds: "cpu", "cuda"
    open: Callable[[Any, torch.device, Path | None], Backend]  # Modules or a Bundle; JIT cache's folder
    extras: Mapping[str, str] = field(default_factory=dict)  # device -> what pip installs beside svd-engine
    flavour: Flavour | None = None  # of TensorRT

    @property
    def of_bundle(self) -> bool:
        return self.runs != "checkpoint"

    def install(self, device: str) -> str:
        """The command that installs what it needs on a kind of device; empty when it needs nothing more."""
        return install_line(self.extras[device]) if device in self.extras else ""


def _eager(modules: Modules, device: torch.device, _jit_cache: Path | None) -> Backend:
    from svd_engine.backends.torch.eager import EagerBackend

    return EagerBackend(modules, device)


def _compiled(modules: Modules, device: torch.device, _jit_cache: Path | None) -> Backend:
    from svd_engine.backends.torch.compiled import CompiledBackend

    return CompiledBackend(modules, device)


def _onnxruntime(bundle: Bundle, device: torch.device, _jit_cache: Path | None) -> Backend:
    from svd_engine.backends.onnxruntime import OrtBackend

    return OrtBackend(bundle, device)


def _tensorrt(bundle: Bundle, device: torch.device, _jit_cache: Path | None) -> Backend:
    from svd_engine.backends.tensorrt.network import TrtBackend

    return TrtBackend(bundle, device, TENSORRT)


def _tensorrt_rtx(bundle: Bundle, device: torch.device, jit_cache: Path | None) -> Backend:
    from svd_engine.backends.tensorrt.network import TrtBackend

    return TrtBackend(bundle, device, TENSORRT_RTX, jit_cache=jit_cache)


_ROWS = (
    BackendEntry("tensorrt", "plans", ("cuda",), _tensorrt, {"cuda": "tensorrt"}, TENSORRT),
    BackendEntry("tensorrt-rtx", "plans", ("cuda",), _tensorrt_rtx, {"cuda": "tensorrt-rtx"}, TENSORRT_RTX),
    BackendEntry("onnxruntime", "graphs", ("cpu", "cuda"), _onnxruntime, {"cpu": "cpu", "cuda": "cuda"}),
    BackendEntry("compiled", "checkpoint", ("cpu", "cuda"), _compiled),
    BackendEntry("eager", "checkpoint", ("cpu", "cuda"), _eager),
)
BACKENDS = {row.name: row for row in _ROWS}
NAMES = ("auto", *BACKENDS)  # what a user may ask for; auto chooses
PLAN_BACKENDS = tuple(row for row in _ROWS if row.flavour is not None)  # as auto tries them


def check_name(backend: str) -> None:
    """Raises SettingsError for a name that is none."""
    if backend not in NAMES:
        raise SettingsError(
            "backend", expected=", ".join(NAMES), got=repr(backend), remedy="Choose one of these."
        )


def names(of_bundle: bool) -> str:
    """Those that run a bundle, or a checkpoint, in words."""
    return ", ".join(row.name for row in _ROWS if row.of_bundle == of_bundle)
