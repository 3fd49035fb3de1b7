"""One ONNX graph becomes a TensorRT plan, by Polygraphy, with either flavour of TensorRT (10.14 up to 11, RTX
1.7).

Precision is the graph's, for networks are strongly typed; TF32 is off, so that float32 means float32.  The
build never loads what it made unless it is on the GPU that will run it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsInt

import torch

from svd_engine.backends.tensorrt.library import library, log
from svd_engine.backends.tensorrt.refit import graph_weights
from svd_engine.backends.tensorrt.weight_streaming import least_weights
from svd_engine.bundle.flavours import TURING, Flavour, Target
from svd_engine.bundle.manifest import CompiledFigures
from svd_engine.errors import BackendUnavailable, ExportError
from svd_export import turing
from svd_export.compiled import read_log
from svd_export.tensorrt_progress import BuildProgress

if TYPE_CHECKING:
    import tensorrt

HardwareCompatibility = Literal["none", "same-cc", "ampere+"]
REMEDIES = {  # by what TensorRT says
    "out of memory": "Free the GPU's memory (nvidia-smi shows who has it), use a smaller workspace, or "
    "export a smaller profile (decode chunk, single guidance).",
    "could not find any implementation": "Use a larger workspace, or export a smaller profile (decode chunk, "
    "single guidance).",
    "": "`svd-export check` names what TensorRT does not take; export again with this version of svd-engine.",
}
DEFAULT_WORKSPACE = 8 * 2**30  # for kernels' scratch; without a limit, builds asked for 86 GB
DEFAULT_LEVEL = 3
IN_PASSING = 2  # of the largest weight, beside those that stay: one is read while the next comes


@dataclass(frozen=True)
class BuildOptions:
    """None: the flavour's default, or nothing where it has no such option."""

    workspace_bytes: int | None = None  # most scratch memory of a kernel
    optimization_level: int | None = None  # 0 to 5: the higher, the longer it looks for kernels
    refittable: bool = False  # other weights can be given, as LoRA makes them: less is known to the compiler
    stripped: bool = False  # no weights inside: they come from the bundle when the plan is loaded
    hardware_compatibility: HardwareCompatibility = "none"  # beyond the card that it is built on
    stream_weights: bool = False  # they can stay in host memory and stream in every run


@dataclass(frozen=True)
class Built:
    plan: memoryview
    timings: memoryview | None  # the timing cache, grown; None of a flavour that has none
    device_memory_bytes: int  # activations of one execution context
    compiled: CompiledFigures | None  # None: the flavour's log does not say
    least_weight_bytes: int | None = None  # on the GPU while the others stream; None: they cannot


def build(
    graph: Path,
    flavour: Flavour,
    target: Target,
    options: BuildOptions,
    timings: bytes,
    say: Callable[[str], None],
) -> Built:
    """Builds for `target`; a flavour that times kernels does so on torch's current GPU.

    `timings` is a timing cache, or nothing.  Raises BackendUnavailable without Polygraphy or when TensorRT
    cannot use the GPU, and ExportError with TensorRT's words when it does not take the graph, finds no
    kernel, or runs out of memory.
    """
    load_polygraphy(flavour)
    from polygraphy.backend.trt import network_from_onnx_path
    from polygraphy.exception import PolygraphyException

    log(flavour).errors_so_far()  # of whatever was before
    with log(flavour).lines() as lines:
        try:  # from a path, for the weights beside it
            network = network_from_onnx_path(str(graph), strongly_typed=True)
        except TypeError as error:  # the bindings' word for a null pointer
            raise BackendUnavailable(
                f"{flavour.title}'s builder",
                expected="a GPU and a driver that it can use",
                got=log(flavour).errors_so_far(),
                remedy="Check with nvidia-smi that the driver is there, and not older than TensorRT's CUDA.",
            ) from error
        except PolygraphyException as error:
            raise _failure(
                graph, "a graph that TensorRT's parser takes", log(flavour).errors_so_far()
            ) from error
        if flavour.targets and TURING in target.capabilities:
            turing.prepare(network[1], library(flavour))
        monitor = _monitor(flavour, BuildProgress(graph.stem.removesuffix(".tensorrt"), say))
        config = _config(network, flavour, target, options, monitor)
        if not flavour.compiles_at_first_launch:
            _use_timings(config, timings, say)
        plan = _built(network, config, monitor)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise _failure(graph, "a plan", log(flavour).errors_so_far())
    content = _bytes_of(plan)
    if flavour.builds_without_gpu:
        figures = read_log(lines).figures()
        least = IN_PASSING * largest_weight(graph) if options.stream_weights else None
        return Built(content, None, figures.activation_bytes, figures, least)
    grown = _bytes_of(config.get_timing_cache().serialize())
    engine = _loaded(graph, flavour, content)
    memory = int(engine.device_memory_size_v2)  # before weights stream, which adds to it
    least = least_weights(engine, len(content)) if options.stream_weights else None
    return Built(content, grown, memory, None, least)


def load_polygraphy(flavour: Flavour) -> None:
    """Imports Polygraphy for a flavour.  It reads its switch while it is imported, so a process has one.

    Raises BackendUnavailable without it, or when it was imported for the other flavour.
    """
    try:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise BackendUnavailable(
            "building TensorRT plans",
            expected="the package polygraphy",
            got="none installed",
            remedy=f"Run: {flavour.install}",
        ) from error
    wanted = flavour.module == "tensorrt_rtx"
    if "polygraphy.backend.trt" in sys.modules and bool(config.USE_TENSORRT_RTX) != wanted:
        raise BackendUnavailable(
            f"building with {flavour.title}",
            expected="one flavour of TensorRT in a process",
            got="Polygraphy, imported for the other one",
            remedy="Build each flavour in a process of its own.",
        )
    config.USE_TENSORRT_RTX = wanted
    from polygraphy.backend.trt import util

    util.TRT_LOGGER = log(flavour)  # TensorRT keeps one logger: ours holds errors and lines
    G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1  # what it would print is in our messages


def _built(network: Any, config: tensorrt.IBuilderConfig, monitor: Any) -> tensorrt.IHostMemory | None:
    """In a thread of its own, which Polygraphy does not do: Python raises an interrupt in the main one, and
    never into TensorRT."""
    from polygraphy.backend.trt import engine_bytes_from_network
    from polygraphy.exception import PolygraphyException

    def select() -> None:
        if here is not None:
            torch.cuda.set_device(here)  # a thread has a GPU of its own

    here = torch.cuda.current_device() if torch.cuda.device_count() else None
    with ThreadPoolExecutor(1, initializer=select) as pool:
        building = pool.submit(engine_bytes_from_network, network, config)
        try:
            plan: tensorrt.IHostMemory | None = building.result()
            return plan
        except PolygraphyException:  # no plan; TensorRT's log says why
            return None
        except BaseException as error:
            monitor.stopped_by = error  # the next step is the last; leaving the block waits for it
            raise


def _config(
    network: Any, flavour: Flavour, target: Target, options: BuildOptions, monitor: Any
) -> tensorrt.IBuilderConfig:
    """By Polygraphy; then what it has no words for with both: refitting, no TF32 in RTX, one stream, weights
    that stream."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library(flavour)

    builder, definition = network[:2]
    common = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED, "progress_monitor": monitor}
    config: trt.IBuilderConfig
    if flavour.targets:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        named = None if target.label == "portable" else list(target.capabilities)
        config = CreateConfigRTX(compute_capabilities=named, **common)(builder, definition)
    else:
        from polygraphy.backend.trt import CreateConfig

        levels: dict[HardwareCompatibility, trt.HardwareCompatibilityLevel] = {
            "none": trt.HardwareCompatibilityLevel.NONE,
            "same-cc": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
            "ampere+": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        }
        config = CreateConfig(
            memory_pool_limits={trt.MemoryPoolType.WORKSPACE: options.workspace_bytes},
            builder_optimization_level=options.optimization_level,
            hardware_compatibility_level=levels[options.hardware_compatibility],
            strip_plan=options.stripped,
            **common,
        )(builder, definition)
        if options.refittable:
            config.set_flag(trt.BuilderFlag.REFIT)
        elif options.stripped:  # the same weights, or the numbers may be wrong
            config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options.stream_weights:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0  # kernels side by side would hold the memory of both
    return config


def _use_timings(config: tensorrt.IBuilderConfig, timings: bytes, say: Callable[[str], None]) -> None:
    """Those of another version or GPU are left out, which Polygraphy does not say: an empty cache takes their
    place."""
    for content in (timings, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return
        say("the timing cache is of another TensorRT or GPU: it is started anew")


def _loaded(graph: Path, flavour: Flavour, plan: memoryview) -> tensorrt.ICudaEngine:
    """A plan for the GPU here, loaded there once to see that it loads, and what it takes."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library(flavour)

    engine: trt.ICudaEngine | None = trt.Runtime(log(flavour)).deserialize_cuda_engine(plan)
    if engine is None:
        raise _failure(graph, "a plan that TensorRT can load", log(flavour).errors_so_far())
    return engine


def largest_weight(graph: Path) -> int:
    """Bytes of the largest of a graph's weights."""
    return max((len(content) for _, _, content in graph_weights(graph)), default=0)


def _monitor(flavour: Flavour, progress: BuildProgress) -> Any:
    """TensorRT's view of `progress`, which Polygraphy takes and has none of.  Nothing may be raised through
    TensorRT: `stopped_by` keeps it."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library(flavour)

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


def _failure(graph: Path, expected: str, said: str) -> ExportError:
    words = said.lower().replace("outofmemory", "out of memory")
    remedy = next(remedy for cause, remedy in REMEDIES.items() if cause in words)
    return ExportError(f"graph {graph.name}", expected=expected, got=said, remedy=remedy)


def _bytes_of(memory: Any) -> memoryview:
    """Of an IHostMemory: it has the buffer protocol, and its signatures do not say so."""
    return memoryview(memory)
