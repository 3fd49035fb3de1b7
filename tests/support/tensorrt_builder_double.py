"""The part of the `tensorrt` double that builds: from an ONNX file to a plan of `tensorrt_plans.plan_of`.

Beyond recording, it holds what a real build would need: graphs are read from files, weights beside them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import Enum, IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from svd_engine.spec.precision import FLOAT32
from svd_engine.spec.tensors import NetworkSpec, TensorSpec
from tests.support import tensorrt_double
from tests.support.tensorrt_double import Recorded, TensorRT
from tests.support.tensorrt_plans import plan_of, weight_types

DEVICE_MEMORY = 4096
STREAMABLE, SCRATCH = 100, 50  # bytes of weights that can stream, and for those in passing


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1  # in 11 it is 0


class BuilderFlag(IntEnum):
    TF32 = 0
    STRIP_PLAN = 1
    REFIT_IDENTICAL = 2
    REFIT = 3
    WEIGHT_STREAMING = 4


class ProfilingVerbosity(Enum):
    LAYER_NAMES_ONLY = 0
    DETAILED = 1


class DeviceType(Enum):
    GPU = 0
    DLA = 1


class LayerType(Enum):
    SHAPE = 0
    QUANTIZE = 1
    DEQUANTIZE = 2


class MemoryPoolType(Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(Enum):
    NONE = 0
    AMPERE_PLUS = 1
    SAME_COMPUTE_CAPABILITY = 2


class IProgressMonitor:
    """To be subclassed."""


class Memory(bytes):
    """IHostMemory: has the buffer protocol."""


class Builder(Recorded):
    def __init__(self, logger: Any) -> None:
        self.trt.logger, self.trt.cuda = logger, None  # it builds on torch's current GPU, whoever selected it
        if self._call("__init__", returns=self) is None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> Any:
        self._call("create_network", flags)
        return Network()

    def create_optimization_profile(self) -> Any:
        return [None]

    def create_builder_config(self) -> Any:
        return self.trt.IBuilderConfig()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        graph = network.graph
        stripped = BuilderFlag.STRIP_PLAN in config.flags
        weights = weight_types(graph) if stripped or BuilderFlag.REFIT in config.flags else None
        streams = (STREAMABLE, SCRATCH) if BuilderFlag.WEIGHT_STREAMING in config.flags else (0, 0)
        plan = plan_of(spec_of(graph), DEVICE_MEMORY, weights, *streams) | {"stripped": stripped}
        config.cache = Memory(config.cache + key_of(graph).encode() + b";")
        if not self.trt.phases(config.progress_monitor):
            return None
        return self._call("build_serialized_network", graph.name, returns=Memory(json.dumps(plan).encode()))


class Network(list):  # type: ignore[type-arg]
    """Its layers, none of them; Polygraphy asks for its inputs as well."""

    graph: Any = None
    num_inputs = num_outputs = num_layers = 0
    name = "network"

    def get_flag(self, flag: Any) -> bool:
        return True


class IBuilderConfig(Recorded):
    def __init__(self) -> None:
        self.flags, self.cache = {BuilderFlag.TF32}, Memory()
        self.profiling_verbosity = self.default_device_type = None
        self.num_optimization_profiles, self.DLA_core = 1, -1
        self.max_aux_streams = -1  # TensorRT chooses
        self.builder_optimization_level = self.hardware_compatibility_level = self.progress_monitor = None
        self.trt.configs.append(self)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self._call("set_memory_pool_limit", pool.name, size)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self.flags

    def add_optimization_profile(self, profile: Any) -> None:
        """Of a network without dynamic shapes: an empty one."""

    def create_timing_cache(self, content: bytes) -> Any:
        return self._call("create_timing_cache", content, returns=Memory(content))

    def set_timing_cache(self, cache: Memory, ignore_mismatch: bool) -> bool:
        taken = not cache.startswith(b"other") and not ignore_mismatch
        if taken:
            self.cache = cache
        return taken

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache)


class OnnxParser(Recorded):
    def __init__(self, network: Any, logger: Any) -> None:
        self.network = network
        self.errors: list[Any] = []

    num_errors = property(lambda self: len(self.errors))

    def get_error(self, index: int) -> Any:
        return self.errors[index]

    def parse_from_file(self, path: str) -> bool:
        self.network.graph = Path(path)
        model = onnx.load(path)  # with its weights, which must lie beside it
        self.errors = [
            SimpleNamespace(
                node_operator=lambda n=node: n.op_type, node_name=lambda n=node: n.name,
                desc=lambda: "No importer registered",
            )
            for node in model.graph.node
            if node.op_type in self.trt.unknown
        ]  # fmt: skip
        for error in self.errors:  # as the real one does, beside handing them out
            self.trt.logger.log(
                self.trt.ILogger.Severity.ERROR, f"{error.desc()} for {error.node_operator()}"
            )
        return bool(self._call("parse_from_file", Path(path).name, returns=not self.errors))


def spec_of(graph: Path) -> NetworkSpec:
    """The table of a graph, as its own inputs and outputs have it."""
    read = onnx.load(str(graph), load_external_data=False).graph

    def table(values: Any) -> Iterator[TensorSpec]:
        for value in values:
            yield TensorSpec(value.name, tuple(d.dim_value for d in value.type.tensor_type.shape.dim))

    return NetworkSpec("any", key_of(graph), tuple(table(read.input)), tuple(table(read.output)), FLOAT32)


def forget_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported for one flavour of TensorRT, and holds its module: for another one, anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)


def two_phases(monitor: Any) -> bool:
    """As TensorRT tells of its work; whether it was let to end it."""
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Timing", "Building", 4)
    going = all(monitor.step_complete("Timing", step) for step in range(4))
    monitor.phase_finish("Timing")
    going = going and all(monitor.step_complete("Building", step) for step in range(2))
    monitor.phase_finish("Building")
    return going


def install(monkeypatch: pytest.MonkeyPatch, version: str = tensorrt_double.VERSION) -> TensorRT:
    """`tensorrt_double.install`, and a builder: on a machine with one GPU.

    Besides it, `configs` are those that were made, `unknown` operators that the parser does not take, and
    `phases` what a build tells its monitor.
    """
    trt: Any = tensorrt_double.install(monkeypatch, version)
    trt.__spec__ = ModuleSpec("tensorrt", None)  # other packages ask whether it is there
    for kind in (
        NetworkDefinitionCreationFlag, BuilderFlag, MemoryPoolType, HardwareCompatibilityLevel,
        ProfilingVerbosity, DeviceType, LayerType,
    ):  # fmt: skip
        setattr(trt, kind.__name__, kind)
    trt.init_libnvinfer_plugins = lambda logger, namespace: True
    forget_polygraphy(monkeypatch)
    for made in (Builder, IBuilderConfig, OnnxParser):
        setattr(trt, made.__name__, type(made.__name__, (made,), {"trt": trt}))
    trt.IProgressMonitor = IProgressMonitor
    trt.configs, trt.unknown, trt.phases = [], set(), two_phases
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # the real one may be installed
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: trt.call("cuda.set_device", device))
    return trt  # type: ignore[no-any-return]


def key_of(graph: Path) -> str:
    """The network's key in the name of its graph."""
    return graph.stem.removesuffix(".tensorrt")
