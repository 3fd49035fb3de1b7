"""The driver's figures, over a stand-in of pynvml whose functions and constants have the real names."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from svd_bench.documents.results import Clocks
from svd_bench.measuring.environment import clock_warning, clocks
from svd_bench.measuring.nvml import Gpu, open_gpu

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


def stand_in(**changed: object) -> SimpleNamespace:
    given: dict[str, object] = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": 1,
        "NVML_TEMPERATURE_GPU": 0,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=5 * 2**30),
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1980 if kind == 1 else 0,
        "nvmlDeviceGetTemperature": lambda handle, kind: 61 if kind == 0 else 0,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x4,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: 12_500,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
    }
    return SimpleNamespace(**given | changed)


def test_units() -> None:
    gpu = Gpu(stand_in(), "ab-cd")
    assert gpu.handle == "GPU-ab-cd"
    assert (gpu.used_bytes(), gpu.clock_mhz(), gpu.temperature_c()) == (5 * 2**30, 1980, 61)
    assert gpu.joules() == 12.5
    assert gpu.driver() == "580.1"


def test_older_bindings_give_bytes() -> None:
    assert Gpu(stand_in(nvmlSystemGetDriverVersion=lambda: b"470.5"), "a").driver() == "470.5"


@pytest.mark.parametrize(("bits", "held"), [(0x0, False), (0x4, False), (0x24, True), (0x48, True)])
def test_heat_and_faults_hold_back_and_the_power_cap_does_not(bits: int, held: bool) -> None:
    gpu = Gpu(stand_in(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: bits), "a")
    assert gpu.throttled() is held


def test_a_gpu_that_does_not_count_energy() -> None:
    def refuse(handle: object) -> int:
        raise NVMLError("not supported")

    assert Gpu(stand_in(nvmlDeviceGetTotalEnergyConsumption=refuse), "a").joules() is None


def test_the_cpu_has_no_gpu_and_misses_none() -> None:
    assert open_gpu(torch.device("cpu")) == (None, "")


def test_without_the_binding_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu(CUDA) == (None, "no driver-level memory, clocks or energy: pip install nvidia-ml-py")


def test_a_driver_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", stand_in(nvmlInit=refuse))
    assert open_gpu(CUDA) == (None, "no driver-level memory, clocks or energy: NVML says Driver Not Loaded")


def test_the_gpu_is_found_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="ab"))
    gpu, why_not = open_gpu(CUDA)
    assert gpu is not None
    assert (gpu.handle, why_not) == ("GPU-ab", "")


def test_every_name_is_pynvmls_own() -> None:
    """Where the binding is installed (it is pure Python and needs no GPU to import)."""
    real = pytest.importorskip("pynvml")
    assert all(hasattr(real, name) for name in vars(stand_in()))


def test_a_clock_that_held_still_is_no_warning() -> None:
    read = clocks(Gpu(stand_in(), "a"), 1950)
    assert read == Clocks(before_mhz=1950, after_mhz=1980, temperature_c=61, throttled=False)
    assert clock_warning("x", read) is None


def test_heat_is_a_warning() -> None:
    gpu = Gpu(stand_in(nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x20), "a")
    assert clock_warning("x", clocks(gpu, 1980)) == "x: the GPU was held back (heat or power brake) at 61 C"
