"""Memory of the process that is free in its C library, and not yet in the system."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed() -> None:
    """On Linux with glibc, which keeps freed blocks below 32 MiB until told not to; elsewhere nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
