"""TensorRT's Python modules, one a flavour: there, of a version that is known here, the log within reach.

What makes plans and what runs them share this file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from svd_engine.bundle.flavours import FLAVOURS, Flavour, Host
from svd_engine.errors import BackendUnavailable


def require(flavour: Flavour) -> str:
    """Its version.  Raises BackendUnavailable when it is not installed, or older or newer than ours."""
    remedy = f"Run: {flavour.install}"
    if flavour.name == "tensorrt":
        remedy += " (pip fetches TensorRT's wheels from NVIDIA's own index)"
    expected = f"the package {flavour.module}, {flavour.versions}"
    try:
        module = import_module(flavour.module)
    except (ImportError, OSError) as error:  # OSError: the package without its libraries
        raise BackendUnavailable(
            f"backend {flavour.name}", expected=expected, got=str(error), remedy=remedy
        ) from error
    version = str(getattr(module, "__version__", "a module without a version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or not flavour.oldest <= (int(numbers[1]), int(numbers[2])) < flavour.too_new:
        raise BackendUnavailable(f"backend {flavour.name}", expected=expected, got=version, remedy=remedy)
    return version


def library(flavour: Flavour) -> Any:
    """The module itself, after `require`."""
    return import_module(flavour.module)


def installed() -> list[Flavour]:
    """The flavours whose module is there, without importing one."""
    return [flavour for flavour in FLAVOURS.values() if _is_there(flavour.module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # a module that was put into sys.modules by hand
        return True


def host(flavour: Flavour, device: torch.device) -> Host:
    """This machine with the GPU `device`.  Raises BackendUnavailable without the flavour's library."""
    version = require(flavour)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return Host(flavour.name, version, name, capability)


@cache  # TensorRT keeps the first logger of a process and complains of a second
def log(flavour: Flavour) -> Any:
    """The logger to pass to TensorRT, after `require`.

    Errors wait in it until `log(flavour).errors_so_far()` takes them; all else goes to `logging`, and to
    whoever listens by `log(flavour).lines()`.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library(flavour)

    levels = {
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.INFO,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.heard: list[str] | None = None

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if self.heard is not None:
                self.heard += msg.splitlines()
            if severity in levels:
                logging.getLogger(__name__).log(levels[severity], msg)
            else:
                self.errors.append(msg)

        def errors_so_far(self) -> str:
            """What TensorRT complained of since the last time, oldest first."""
            said, self.errors = "; ".join(self.errors), []
            return said or f"no word from {flavour.title}'s log"

        @contextmanager
        def lines(self) -> Iterator[list[str]]:
            """Every line that TensorRT writes while the block runs, of whatever severity."""
            heard: list[str] = []
            self.heard = heard
            try:
                yield heard
            finally:
                self.heard = None

    return Log()
