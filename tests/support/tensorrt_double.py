"""A stand-in for the modules `tensorrt` and `tensorrt_rtx`, and for the CUDA beneath, on a machine without.

`install` puts it where an import finds it.  It records every call in order, fails where a test says
so, and reads and writes memory at the addresses that it was given, so a wrong address is a wrong video.
What a network computes is up to the test: `compute(key, inputs) -> outputs`, by name.  A plan is JSON
here, of the form that `tensorrt_plans.plan_of` gives.
"""

from __future__ import annotations

import ctypes
import json
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from svd_engine.backends.tensorrt import library as trt_library
from svd_engine.bundle.flavours import TENSORRT, Flavour

GPU, CAPABILITY, VERSION = "NVIDIA Any 80GB", (9, 0), "10.14.1.48"
Compute = Callable[[str, Mapping[str, Tensor]], Mapping[str, Tensor]]


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    INT64 = 8
    BF16 = 7


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


@dataclass
class Fault:
    """What a call does instead: says something in the log, then returns or raises."""

    returns: Any = None
    raises: BaseException | None = None
    says: str = ""


class TensorRT(ModuleType):
    """The module.  `calls` holds ("Class.method", arguments) in order, `faults` what fails, named alike."""

    Severity, DataType, TensorIOMode, TensorLocation = Severity, DataType, TensorIOMode, TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger

    def __init__(self, version: str = VERSION, name: str = "tensorrt") -> None:
        super().__init__(name)
        self.__version__ = version
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.faults: dict[str, Fault] = {}
        self.compute: Compute = nothing
        self.logger: Any = None
        self.cuda: CudaDouble | None = None
        kinds: list[type] = [Runtime, ICudaEngine, IExecutionContext, Refitter, Weights]
        if name == "tensorrt_rtx":
            kinds += [IRuntimeConfig, IRuntimeCache]
            self.CudaGraphStrategy, self.EngineValidity = CudaGraphStrategy, EngineValidity
            self.EngineInvalidityDiagnostics = EngineInvalidityDiagnostics
        for kind in kinds:
            setattr(self, kind.__name__, type(kind.__name__, (kind,), {"trt": self}))

    def called(self, *names: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of these names."""
        return [arguments for name, arguments in self.calls if name in names]

    def order(self) -> list[str]:
        return [name for name, _ in self.calls]

    def call(self, name: str, *arguments: Any, returns: Any = None) -> Any:
        """Records a call and gives its result, or its fault's."""
        self.calls.append((name, arguments))
        fault = self.faults.get(name)
        if fault is None:
            return returns
        if fault.says:
            self.logger.log(Severity.ERROR, fault.says)
        if fault.raises is not None:
            raise fault.raises
        return fault.returns


class Recorded:
    """A class of the module; `type(self).trt` is the module that it belongs to."""

    trt: ClassVar[Any]

    def _call(self, name: str, *arguments: Any, returns: Any = None) -> Any:
        cuda = self.trt.cuda
        assert cuda is None or cuda.is_selected, f"{name} while another GPU may be the current one"
        return self.trt.call(f"{type(self).__name__}.{name}", *arguments, returns=returns)

    def __del__(self) -> None:
        self.trt.calls.append((f"{type(self).__name__}.freed", ()))


class Runtime(Recorded):
    def __init__(self, logger: Any) -> None:
        self.trt.logger = logger
        self._call("__init__")

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:
        try:
            engine = self.trt.ICudaEngine(json.loads(bytes(serialized_engine)), self)
        except ValueError:
            self.trt.logger.log(Severity.ERROR, "the plan is not one")
            engine = None
        return self._call("deserialize_cuda_engine", len(serialized_engine), returns=engine)

    def get_engine_validity(self, buffer: bytes) -> Any:
        return self._call("get_engine_validity", len(buffer), returns=(EngineValidity.VALID, 0))


class IRuntimeConfig(Recorded):
    """Only of TensorRT for RTX.  Like the real one, it has names for what TensorRT passes to the engine."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.cuda_graph_strategy, self.strategy, self.cache = engine, None, None, None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self._call("create_runtime_cache", returns=self.trt.IRuntimeCache(self.engine.plan["key"]))

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return bool(self._call("set_runtime_cache", returns=True))


class IRuntimeCache(Recorded):
    """Holds the name of the network that was launched with it."""

    def __init__(self, key: str) -> None:
        self.key, self.content = key, b""

    def deserialize(self, blob: bytes) -> bool:
        taken = blob == self.key.encode()
        self.content = blob if taken else b""
        return bool(self._call("deserialize", bytes(blob), returns=taken))

    def serialize(self) -> Any:
        return self._call("serialize", returns=self.content)


class ICudaEngine(Recorded):
    def __init__(self, plan: dict[str, Any], runtime: Any = None) -> None:
        self.plan, self._runtime = plan, runtime
        self.weights: dict[str, bytes] = {}
        self.refitted = not plan["stripped"]
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._budget = self.streamable_weights_size  # nothing streams

    @property
    def device_memory_size_v2(self) -> int:
        return int(self.plan["device_memory"]) + self.weight_streaming_scratch_memory_size

    @property
    def streamable_weights_size(self) -> int:
        return int(self.plan["streamable"])

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        """As the real one, it takes no word back when it refuses: beside a context, or built without."""
        can = self.streamable_weights_size > 0 and not self.contexts
        if self._call("weight_streaming_budget_v2", budget, returns=can):
            self._budget = min(budget, self.streamable_weights_size)

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return int(self.plan["scratch"]) if self._budget < self.streamable_weights_size else 0

    @property
    def num_io_tensors(self) -> int:
        return len(self.plan["tensors"])

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.plan["tensors"])[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.plan["tensors"][name]["mode"]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.plan["tensors"][name]["dtype"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.plan["tensors"][name]["shape"])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self.plan["tensors"][name]["location"]]

    def create_execution_context(self, how: Any) -> Any:
        """By an allocation strategy, or by a runtime configuration, which TensorRT for RTX has."""
        if isinstance(how, IRuntimeConfig):
            context = self.trt.IExecutionContext(self, how)
            given = (how.strategy.name, how.cuda_graph_strategy.name)
        else:
            context, given = self.trt.IExecutionContext(self), (how.name,)
        self.contexts.add(context)
        return self._call("create_execution_context", *given, returns=context)

    def create_runtime_config(self) -> Any:
        return self._call("create_runtime_config", returns=self.trt.IRuntimeConfig(self))


class IExecutionContext(Recorded):
    def __init__(self, engine: Any, config: Any = None) -> None:
        self.engine, self.config = engine, config
        self.addresses: dict[str, int] = {}
        self.memory = (0, 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return bool(
            self._call("set_tensor_address", name, memory, returns=name in self.engine.plan["tensors"])
        )

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)
        self._call("set_device_memory", self.engine.plan["key"], memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        fine = bool(self._call("execute_async_v3", self.engine.plan["key"], stream_handle, returns=True))
        if fine:
            if self.config is not None and self.config.cache is not None:  # kernels are compiled
                self.config.cache.content = self.engine.plan["key"].encode()
            cuda = self.trt.cuda
            launch = Launch(weakref.ref(self), dict(self.addresses), self.memory)
            if cuda.recording is None:
                launch()
            else:
                cuda.recording.append(launch)
        return fine


@dataclass
class Launch:
    """The work of one call, with the addresses that it had then: what a CUDA graph holds.

    Like one, it keeps nothing alive.
    """

    context: weakref.ref[IExecutionContext]
    addresses: dict[str, int]
    memory: tuple[int, int]

    def __call__(self) -> None:
        context = self.context()
        assert context is not None, "the execution context was freed"
        plan, cuda = context.engine.plan, context.trt.cuda
        assert context.engine.refitted, "an engine without its weights"
        assert self.memory[1] >= context.engine.device_memory_size_v2, (
            f"{self.memory[1]} bytes for {plan['key']}"
        )
        cuda.check_alive(self.memory[0])
        inputs, outputs = {}, {}
        for name, row in plan["tensors"].items():
            cuda.check_alive(self.addresses[name])
            if row["mode"] == "INPUT":
                inputs[name] = memory_at(self.addresses[name], row["shape"]).clone()
            else:
                outputs[name] = memory_at(self.addresses[name], row["shape"])
        for name, made in context.trt.compute(plan["key"], inputs).items():
            outputs[name].copy_(made)


class Weights(Recorded):
    def __init__(self, type: DataType, ptr: int, count: int) -> None:
        self.dtype, self.size = type, count
        width = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "BOOL": 1}[type.name]
        self.content = ctypes.string_at(ptr, count * width)

    def __del__(self) -> None:
        """Of no interest."""


class Refitter(Recorded):
    """Of a plan that lists `weights`: {name: type}."""

    def __init__(self, engine: Any, logger: Any) -> None:
        self.engine = engine
        self.trt.logger = logger
        self._call("__init__", engine.plan["key"])

    def get_all_weights(self) -> list[str]:
        return list(self.engine.plan["weights"])

    def set_named_weights(self, name: str, weights: Any) -> bool:
        agrees = self.engine.plan["weights"][name] == weights.dtype.name
        if agrees:
            self.engine.weights[name] = weights.content
        return bool(self._call("set_named_weights", name, weights.dtype.name, weights.size, returns=agrees))

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.engine.plan["weights"] if name not in self.engine.weights]

    def refit_cuda_engine(self) -> bool:
        self.engine.refitted = bool(self._call("refit_cuda_engine", returns=True))
        return bool(self.engine.refitted)


@dataclass
class Graph:
    """What `capture` returns; calling it is a replay."""

    trt: TensorRT
    launches: list[Launch]

    def __call__(self) -> None:
        self.trt.call("cuda.replay")
        for launch in self.launches:
            launch()

    def __del__(self) -> None:
        self.trt.calls.append(("cuda.graph freed", ()))


class CudaDouble:
    """`trt_cuda.Cuda` with tensors of the CPU.  Its steps stand among the module's calls, as "cuda.step"."""

    def __init__(self, trt: TensorRT, device: torch.device) -> None:
        self.trt, self.device = trt, device
        self.recording: list[Launch] | None = None
        self.alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.stream = 7
        self.is_selected = False
        trt.cuda = self

    def empty(self, what: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        self.trt.call("cuda.empty", what, tuple(shape))
        tensor = torch.empty(shape, dtype=dtype)
        self.alive[tensor.data_ptr()] = tensor
        weakref.finalize(tensor, self.trt.calls.append, ("cuda.freed", (what,)))
        return tensor

    def check_alive(self, address: int) -> None:
        assert address in self.alive, f"memory at {address} was freed, or never was a buffer"

    @contextmanager
    def selected(self) -> Iterator[None]:
        self.is_selected = True
        try:
            yield
        finally:
            self.is_selected = False

    @contextmanager
    def aside(self) -> Iterator[int]:
        self.trt.call("cuda.wait for torch")
        yield self.stream
        self.trt.call("cuda.torch waits")

    def capture(self, launch: Callable[[int], bool]) -> Callable[[], None] | None:
        self.trt.call("cuda.capture")
        self.recording = graph = []
        launched = launch(self.stream)
        self.recording = None

        return Graph(self.trt, graph) if launched else None

    def synchronize(self) -> None:
        self.trt.call("cuda.synchronize")


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str = VERSION,
    flavour: Flavour = TENSORRT,
    capability: tuple[int, int] = CAPABILITY,
) -> TensorRT:
    """The double as a flavour's module, on a machine with one GPU whose tensors lie on the CPU."""
    trt = TensorRT(version, flavour.module)
    monkeypatch.setitem(sys.modules, flavour.module, trt)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("svd_engine.backends.tensorrt.network.Cuda", lambda device: CudaDouble(trt, device))
    trt_library.log.cache_clear()
    return trt


def nothing(key: str, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    raise AssertionError(f"{key} ran, and the test gave it nothing to compute")


def memory_at(address: int, shape: tuple[int, ...]) -> Tensor:
    """float32 values where they lie, as a tensor that shares the memory."""
    count = int(np.prod(shape))
    values = np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
    return torch.from_numpy(values).view(shape)
