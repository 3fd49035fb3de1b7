"""TensorRT's Python module: there, of a version that is known here, its log within reach.

What makes plans and what runs them share this file.  Both call `require_tensorrt` first and then import
`tensorrt` where they use it.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from typing import Any

import torch

from svd_engine.errors import BackendUnavailable
from svd_engine.plans import Machine

INSTALL = "pip install 'svd-engine[tensorrt]'"
OLDEST, TOO_NEW = (10, 14), (12, 0)  # Attention from 10.14; 12 is unknown


def require_tensorrt() -> str:
    """Its version.  Raises BackendUnavailable when it is not installed, or older or newer than ours."""
    remedy = f"Run: {INSTALL} (pip fetches TensorRT's wheels from NVIDIA's own index)"
    expected = "the package tensorrt, 10.14 or newer and below 12"
    try:
        import tensorrt as trt
    except (ImportError, OSError) as error:  # OSError: the package without its libraries
        raise BackendUnavailable(
            "backend tensorrt", expected=expected, got=str(error), remedy=remedy
        ) from error
    version = str(getattr(trt, "__version__", "a module without a version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or not OLDEST <= (int(numbers[1]), int(numbers[2])) < TOO_NEW:
        raise BackendUnavailable("backend tensorrt", expected=expected, got=version, remedy=remedy)
    return version


def machine(device: torch.device) -> Machine:
    """This machine with the GPU `device`.  Raises BackendUnavailable without TensorRT."""
    version = require_tensorrt()
    return Machine(version, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


@cache  # TensorRT keeps the first logger of a process and complains of a second
def log() -> Any:
    """The logger to pass to TensorRT, after `require_tensorrt`.

    Errors wait in it until `log().errors_so_far()` takes them; all else goes to `logging`.
    """
    import tensorrt as trt

    levels = {
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.INFO,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in levels:
                logging.getLogger(__name__).log(levels[severity], msg)
            else:
                self.errors.append(msg)

        def errors_so_far(self) -> str:
            """What TensorRT complained of since the last time, oldest first."""
            said, self.errors = "; ".join(self.errors), []
            return said or "no word from TensorRT's log"

    return Log()
