"""How much memory an engine may take: what a user says of it, in bytes."""

from __future__ import annotations

import math
import platform
import re
import sys
from dataclasses import dataclass

import torch

from svd_engine.errors import SettingsError
from svd_engine.host_memory import free_bytes, swap_bytes, total_bytes
from svd_engine.report import size
from svd_engine.residency.holding import unknown_to_torch

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
AUTO_SHARE = 0.9  # of the memory that is free: the rest is a margin
CUDA_RUNTIME_BYTES = 512 * 2**20  # a CUDA context, and the workspaces of cuBLAS and cuDNN
HOST_RUNTIME_BYTES = 64 * 2**20  # what libraries make on their first run: threads, kernels

Memory = str | int | float  # "8GiB", "0.9", "auto"; bytes; a share


@dataclass(frozen=True)
class Budget:
    """Bytes of one device, or of the host where networks run on the CPU, that a whole process may take.

    there: of "auto", bytes that nothing can exceed.  A call that is planned with more than `bytes`, which are
    an estimate, is tried as long as it does not surely need more than `there`.
    """

    bytes: int
    there: int | None = None

    def __str__(self) -> str:
        return size(self.bytes)


NO_LIMIT = Budget(2**62)


def check_memory(memory: object) -> None:
    """Raises SettingsError for what says no amount of memory."""
    if memory not in (None, "auto"):
        _amount(memory)


def budget_of(memory: Memory, device: torch.device) -> Budget:
    """Of "auto" what is free on `device` less a margin, and what this process has of it already.

    Raises SettingsError for what says no amount of memory.
    """
    if memory == "auto":
        return Budget(int(AUTO_SHARE * _free(device)) + used_by_runtime(device), _there(device))
    amount = _amount(memory)
    return Budget(int(amount * _total(device)) if isinstance(amount, float) else amount)


def used_by_runtime(device: torch.device) -> int:
    """What this process takes before an engine loads networks: of a GPU what torch and engines know."""
    if device.type == "cuda":
        return CUDA_RUNTIME_BYTES + torch.cuda.memory_allocated(device) + unknown_to_torch(device)
    import psutil

    return int(psutil.Process().memory_info().rss) + HOST_RUNTIME_BYTES


def _amount(memory: object) -> int | float:
    """Bytes as an int, a share of all memory as a float."""
    text = str(memory).strip() if isinstance(memory, (str, int, float)) and memory is not True else ""
    if isinstance(memory, int) and text.isdecimal() and memory > 0:
        return memory
    if re.fullmatch(r"\d*\.?\d+", text) and 0 < float(text) <= 1:
        return float(text)
    measured = re.fullmatch(r"(\d*\.?\d+) ?([KMG]i?B)", text, re.IGNORECASE)
    if measured and 1 <= (count := float(measured[1]) * UNITS[measured[2].upper()]) < math.inf:
        return int(count)
    raise SettingsError(
        "memory",
        expected='an amount such as "8GiB", a share of all memory up to 1 such as "0.9", or "auto"',
        got=repr(memory),
        remedy="Pass one of these.",
    )


def _free(device: torch.device) -> int:
    if device.type == "cuda" and not _shares_host_memory(device):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for reuse
        return torch.cuda.mem_get_info(device)[0] + kept
    return free_bytes()


def _total(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else total_bytes()


def _there(device: torch.device) -> int:
    """All that an allocator could give: of the host with its swap, of a GPU with what it is lent."""
    if device.type == "cuda":
        lent = total_bytes() if _lends_to_gpu() else 0
        return _total(device) + lent
    return total_bytes() + swap_bytes()


def _shares_host_memory(device: torch.device) -> bool:
    """Whether a GPU has none of its own: what CUDA calls free there leaves out what the host can clear."""
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def _lends_to_gpu() -> bool:
    """Whether the driver gives a full GPU host memory, as it does on Windows and under WSL."""
    return sys.platform == "win32" or "microsoft" in platform.release().lower()
