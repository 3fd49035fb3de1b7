"""What the recording double takes for granted, held against the real bindings: how they say "none", how they
count, and that our logger is one."""

from __future__ import annotations

import pytest

from tests.contract.bindings import RTX, Bindings

RUNTIME = """
import torch
import tensorrt as trt
from svd_engine.backends.tensorrt import library as trt_library
from svd_engine.bundle.flavours import TENSORRT

print(trt_library.require(TENSORRT))
log = trt_library.log(TENSORRT)
log.log(trt.ILogger.Severity.ERROR, "words")
log.log(trt.ILogger.Severity.WARNING, "only a warning")
print(log.errors_so_far())
for make in (trt.Runtime, trt.Builder):
    try:
        make(log)
    except TypeError as error:
        print("TypeError", "nullptr" in str(error))
values = torch.zeros(6)
weights = trt.Weights(trt.DataType.FLOAT, values.data_ptr(), 6)
print(weights.size, weights.nbytes, weights.dtype.name)
shape = trt.Dims((2, 3))
print([shape[axis] for axis in range(len(shape))])
for member in (trt.DataType.HALF, trt.DataType.BF16, trt.TensorIOMode.INPUT, trt.TensorLocation.DEVICE):
    print(member.name)
"""


def test_what_the_double_takes_for_granted(real: Bindings) -> None:
    if real.version == RTX:
        pytest.skip("its libraries are real; see below")
    version, *said = real.python(RUNTIME).splitlines()
    assert version.startswith(real.version)
    assert said == [
        "words",
        "TypeError True",
        "TypeError True",
        "6 24 FLOAT",
        "[2, 3]",
        *("HALF", "BF16", "INPUT", "DEVICE"),
    ]


RTX_RUNTIME = """
import torch
import tensorrt_rtx as trt
from svd_engine.backends.tensorrt import library as trt_library
from svd_engine.backends.tensorrt.jit import invalidity
from svd_engine.bundle.flavours import TENSORRT_RTX

print(trt_library.require(TENSORRT_RTX))
log = trt_library.log(TENSORRT_RTX)
runtime = trt.Runtime(log)
print(runtime.deserialize_cuda_engine(b"no plan"))
print(invalidity(runtime, b"no plan") != "")
print(log.errors_so_far() != "")
print(int(trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC))
print("strategy" in trt.ICudaEngine.create_execution_context.__doc__,
      "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__)
"""


def test_what_the_double_takes_for_granted_of_rtx(real: Bindings) -> None:
    """A runtime without a GPU, which loads nothing and says that a plan is invalid; diagnostics as bits."""
    if real.version != RTX:
        pytest.skip("of TensorRT for RTX")
    version, *said = real.python(RTX_RUNTIME).splitlines()
    assert version.startswith("1.")
    assert said == [
        "None",
        "True",
        "True",
        "2",
        "True True",
    ]
