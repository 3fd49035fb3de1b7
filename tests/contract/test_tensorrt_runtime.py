"""What the recording double takes for granted, held against the real bindings: how they say "none", how they
count, and that our logger is one."""

from __future__ import annotations

from tests.contract.bindings import Bindings

RUNTIME = """
import torch
import tensorrt as trt
from svd_engine.backends import trt_library

print(trt_library.require_tensorrt())
log = trt_library.log()
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
