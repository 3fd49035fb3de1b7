"""One ONNX graph becomes a TensorRT plan, by TensorRT's own API: what it calls exists from 10.12 to 11.

Precision is the graph's, for networks are strongly typed; TF32 is off, so that float32 means float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt

import torch

from svd_engine.backends.trt_library import log
from svd_engine.errors import BackendUnavailable, ExportError
from svd_engine.manifest import HardwareCompatibility
from svd_export.tensorrt_progress import Progress

if TYPE_CHECKING:
    import tensorrt

FORMS = "export another form of the graphs (`svd-export onnx CHECKPOINT -o BUNDLE --form FORM`)"
REMEDIES = {  # by what TensorRT says
    "out of memory": "Free the GPU's memory (nvidia-smi shows who has it), use a smaller workspace, or "
    "export a smaller profile (decode chunk, single guidance).",
    "could not find any implementation": f"Use a larger workspace, or {FORMS}.",
    "": f"`svd-export check` names what TensorRT does not take; or {FORMS}.",
}


@dataclass(frozen=True)
class BuildOptions:
    workspace_bytes: int = 8 * 2**30  # for kernels' scratch; without a limit, builds asked for 86 GB
    optimization_level: int = 3  # 0 to 5: the higher, the longer it looks for kernels
    refittable: bool = False  # weights can be given again, the same ones: others may give wrong numbers
    stripped: bool = False  # no weights inside: they come from the bundle when the plan is loaded
    hardware_compatibility: HardwareCompatibility = "none"


@dataclass(frozen=True)
class Built:
    plan: memoryview
    timings: memoryview  # the timing cache, grown
    device_memory_bytes: int


def build(graph: Path, options: BuildOptions, timings: bytes, say: Callable[[str], None]) -> Built:
    """Builds on torch's current GPU; `timings` is a timing cache, or nothing.

    Raises BackendUnavailable when TensorRT cannot use the GPU, and ExportError with TensorRT's words when
    it does not take the graph, finds no kernel, or runs out of memory.
    """
    import tensorrt as trt

    log().errors_so_far()  # of whatever was before
    try:
        builder = trt.Builder(log())
    except TypeError as error:  # the bindings' word for a null pointer
        raise BackendUnavailable(
            "TensorRT's builder",
            expected="a GPU and a driver that it can use",
            got=log().errors_so_far(),
            remedy="Check with nvidia-smi that the driver is there, and not older than TensorRT's CUDA.",
        ) from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log())
    if not parser.parse_from_file(str(graph)):  # from a file, for the weights beside it
        raise _failure(graph, "a graph that TensorRT's parser takes", _parser_errors(parser))
    monitor = _monitor(Progress(graph.stem, say))
    config = _config(builder, options)
    config.progress_monitor = monitor
    _use_timings(config, timings, say)
    plan = _built(builder, network, config, monitor)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise _failure(graph, "a plan", log().errors_so_far())
    content = _bytes_of(plan)
    engine = trt.Runtime(log()).deserialize_cuda_engine(content)
    if engine is None:
        raise _failure(graph, "a plan that TensorRT can load", log().errors_so_far())
    grown = _bytes_of(config.get_timing_cache().serialize())
    return Built(content, grown, int(engine.device_memory_size_v2))


def _built(
    builder: tensorrt.Builder,
    network: tensorrt.INetworkDefinition,
    config: tensorrt.IBuilderConfig,
    monitor: Any,
) -> tensorrt.IHostMemory | None:
    """In a thread of its own: Python raises an interrupt in the main one, and never into TensorRT."""
    here = (torch.cuda.current_device(),)  # a thread has a GPU of its own
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=here) as pool:
        building = pool.submit(builder.build_serialized_network, network, config)
        try:
            return building.result()
        except BaseException as error:
            monitor.stopped_by = error  # the next step is the last; leaving the block waits for it
            raise


def _config(builder: tensorrt.Builder, options: BuildOptions) -> tensorrt.IBuilderConfig:
    import tensorrt as trt

    levels: dict[HardwareCompatibility, trt.HardwareCompatibilityLevel] = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "same-cc": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    config.hardware_compatibility_level = levels[options.hardware_compatibility]
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if options.stripped or options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    return config


def _use_timings(config: tensorrt.IBuilderConfig, timings: bytes, say: Callable[[str], None]) -> None:
    """Those of another version or GPU are left out: an empty cache takes their place."""
    for content in (timings, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        say("the timing cache is of another TensorRT or GPU: it is started anew")


def _monitor(progress: Progress) -> Any:
    """TensorRT's view of `progress`.  Nothing may be raised through TensorRT: `stopped_by` keeps it."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase_name: str, _parent: str, num_steps: SupportsInt) -> None:
            self._tell(lambda: progress.start(phase_name, int(num_steps)))

        def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
            self._tell(lambda: progress.step(phase_name, int(step)))
            return self.stopped_by is None  # False ends the build early

        def phase_finish(self, phase_name: str) -> None:
            self._tell(lambda: progress.finish(phase_name))

        def _tell(self, what: Callable[[], None]) -> None:
            try:
                what()
            except BaseException as error:  # an interrupt too
                self.stopped_by = error

    return Monitor()


def _parser_errors(parser: tensorrt.OnnxParser) -> str:
    said = []
    for index in range(parser.num_errors):
        error: tensorrt.ParserError = parser.get_error(index)
        said.append(f"{error.node_operator()} {error.node_name()}: {error.desc()}")
    return "; ".join(said) or str(log().errors_so_far())


def _failure(graph: Path, expected: str, said: str) -> ExportError:
    words = said.lower().replace("outofmemory", "out of memory")
    remedy = next(remedy for cause, remedy in REMEDIES.items() if cause in words)
    return ExportError(f"graph {graph.name}", expected=expected, got=said, remedy=remedy)


def _bytes_of(memory: Any) -> memoryview:
    """Of an IHostMemory: it has the buffer protocol, and its signatures do not say so."""
    return memoryview(memory)
