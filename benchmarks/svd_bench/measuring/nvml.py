"""A GPU as its driver sees it: memory of every library, clocks, temperature, energy.

torch counts only its own allocator's memory; ONNX Runtime and TensorRT allocate beside it.
"""

from __future__ import annotations

from typing import Protocol

import torch

# Bits of NVML's clock event reasons that mean the hardware was held back by heat or a fault.  The power cap
# (0x4) is left out: large GPUs run at it under any full load, and the clock itself is compared.
THROTTLED = 0x8 | 0x20 | 0x40 | 0x80  # hardware, software thermal, hardware thermal, power brake


class Nvml(Protocol):
    """What is called of the module pynvml."""

    NVML_CLOCK_SM: int
    NVML_TEMPERATURE_GPU: int
    NVMLError: type[Exception]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> object: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object) -> MemoryInfo: ...
    def nvmlDeviceGetClockInfo(self, handle: object, kind: int) -> int: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int) -> int: ...
    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: object) -> int: ...
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: object) -> int: ...  # mJ
    def nvmlSystemGetDriverVersion(self) -> str | bytes: ...


class MemoryInfo(Protocol):
    used: int  # bytes


class Gpu:
    """`nvml` is the module pynvml, initialised; `uuid` as torch gives it, because indices differ."""

    def __init__(self, nvml: Nvml, uuid: str) -> None:
        self.nvml = nvml
        self.handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def used_bytes(self) -> int:
        """Device memory in use, of all processes."""
        return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used)

    def clock_mhz(self) -> int:
        return int(self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))

    def temperature_c(self) -> int:
        return int(self.nvml.nvmlDeviceGetTemperature(self.handle, self.nvml.NVML_TEMPERATURE_GPU))

    def throttled(self) -> bool:
        return bool(self.nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.handle) & THROTTLED)

    def joules(self) -> float | None:
        """Since the driver was loaded; None before Volta, which does not count."""
        try:
            return int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1e3
        except self.nvml.NVMLError:
            return None

    def driver(self) -> str:
        version = self.nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)


def open_gpu(device: torch.device) -> tuple[Gpu | None, str]:
    """The GPU, or None and why there is none; the reason is empty on the CPU, where none is missed."""
    if device.type != "cuda":
        return None, ""
    try:
        import pynvml
    except ImportError:
        return None, "no driver-level memory, clocks or energy: pip install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return Gpu(pynvml, str(torch.cuda.get_device_properties(device).uuid)), ""
    except pynvml.NVMLError as error:
        return None, f"no driver-level memory, clocks or energy: NVML says {error}"
