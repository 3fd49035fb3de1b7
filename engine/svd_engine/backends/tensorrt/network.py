"""TensorRT on a CUDA GPU, over the plans of a bundle; one code for both flavours.

    plan -> engine -> context          made once, by name-based bindings
    inputs -> fixed buffers -> launch -> output buffers

Addresses never change, so the denoiser's launch is recorded as a CUDA graph on its second call (the
first one lets TensorRT settle) and replayed from then on; TensorRT for RTX records its own (`jit`).
Activations of all contexts share one block.  Nothing waits for the GPU between calls: work is ordered by
streams alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svd_engine.backends.segmented import SegmentedDecoder
from svd_engine.backends.tensorrt.cuda import LESS_MEMORY, Cuda, SharedMemory, driver_version
from svd_engine.backends.tensorrt.jit import Jit, invalidity, jit_context
from svd_engine.backends.tensorrt.jit_cache import JitCache, cache_of, notices
from svd_engine.backends.tensorrt.library import host, library, log
from svd_engine.backends.tensorrt.refit import refit
from svd_engine.backends.tensorrt.weight_streaming import stream_weights
from svd_engine.bundle.flavours import FLAVOURS, TENSORRT, Flavour
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.plans import build_remedy, fitting_plan, weight_bytes
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendError, BackendUnavailable
from svd_engine.report import size
from svd_engine.spec.network import Network, Placement
from svd_engine.spec.reuse import SHALLOW
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt

RECORDED = ("denoiser", SHALLOW)  # the only ones that a call runs many times
DTYPE_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
REPORT = "Report this with TensorRT's version and the GPU's name."


class TrtNetwork(Network):
    """One engine with its context, its buffers and, when `record` is on, its CUDA graph.

    `jit` holds the kernels of a flavour that compiles them on the card, at the first launch.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        placement: Placement,
        engine: tensorrt.ICudaEngine,
        context: tensorrt.IExecutionContext,
        cuda: Cuda,
        memory: SharedMemory,
        record: bool,
        jit: Jit | None = None,
    ) -> None:
        super().__init__(spec, placement)
        self.engine, self.context, self.cuda, self.memory, self.record = engine, context, cuda, memory, record
        self.jit = jit
        self.inputs = {tensor.name: self._buffer(tensor) for tensor in spec.inputs}
        self.outputs = {tensor.name: self._buffer(tensor) for tensor in spec.outputs}
        for name, buffer in (self.inputs | self.outputs).items():
            if not context.set_tensor_address(name, buffer.data_ptr()):
                raise self._error(f"a buffer for {name}")
        memory.reserve(self, engine.device_memory_size_v2)
        self._activations = (0, 0)  # address and bytes of their memory, as the context knows it
        self._warm = False
        self._replay: Callable[[], None] | None = None

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name])
        with self.cuda.selected():
            self._use(self.memory.block())
            if self._replay is None and self._warm and self.record:
                self._replay = self._recorded()
            if self._replay is not None:
                self._replay()
            else:
                self._launch()
        return dict(self.outputs)

    def input_buffer(self, name: str) -> Tensor:
        return self.inputs[name].zero_()

    @property
    def needs_warm_up(self) -> bool:
        return self.jit is not None and not self.jit.is_warm

    def warm_up(self) -> None:
        """One launch on ones, for the kernels that it compiles; what it computes is not used."""
        if self.jit is None or self.jit.is_warm:
            return
        kept = f", kept in {self.jit.cache.path.parent}" if self.jit.cache else ""
        notices.info("compiling kernels of %s for this GPU%s", self.spec.network, kept)
        for buffer in self.inputs.values():
            buffer.fill_(1)
        with self.cuda.selected():
            self._use(self.memory.block())
            self._launch()
            self.cuda.synchronize()

    def _buffer(self, tensor: TensorSpec) -> Tensor:
        what = f"{tensor.name} of {self.spec.key}"
        return self.cuda.empty(what, tensor.shape, getattr(torch, tensor.dtype))

    def _launch(self) -> None:
        with self.cuda.aside() as stream:
            launched = self.context.execute_async_v3(stream)
        if not launched:
            raise self._error("a launch without error")
        self._warm = True
        if self.jit is not None:
            self.jit.settle()

    def close(self) -> None:
        """Graph, context, engine, then the memory that they point to."""
        with self.cuda.selected():
            self.cuda.synchronize()
            del self._replay, self.context, self.jit, self.engine, self.inputs, self.outputs
            self.memory.release(self)

    def _use(self, block: Tensor) -> None:
        activations = (block.data_ptr(), block.nbytes)
        if self._activations != activations:
            self.context.set_device_memory(*activations)
            self._activations = activations
            self._warm, self._replay = False, None  # a graph holds addresses, and the context settles again

    def _recorded(self) -> Callable[[], None]:
        try:
            replay = self.cuda.capture(self.context.execute_async_v3)
        except RuntimeError as error:
            raise self._error("a CUDA graph of its launch", f" ({error})") from error
        if replay is None:
            raise self._error("a CUDA graph of its launch")
        return replay

    def _error(self, expected: str, more: str = "") -> BackendError:
        flavour = FLAVOURS[self.placement.backend]
        said = log(flavour).errors_so_far() + more
        return BackendError(
            f"{flavour.title}, {self.spec.key} on {self.placement.device}",
            expected=expected,
            got=said,
            remedy=remedy(said, REPORT),
        )


class TrtBackend:
    """`graphs` off launches every call anew, for looking for faults.

    jit_cache: folder of the kernels that the flavour compiles on the card; None keeps none.
    """

    movable = False

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device,
        flavour: Flavour = TENSORRT,
        *,
        graphs: bool = True,
        jit_cache: Path | None = None,
    ) -> None:
        self.flavour, self.name = flavour, str(flavour.name)
        self.host = host(flavour, device)
        self.bundle, self.device, self.graphs, self.jit_cache = bundle, device, graphs, jit_cache
        self.cuda = Cuda(device)
        self.memory = SharedMemory(self.cuda)
        self._runtime: tensorrt.Runtime | None = None

    def open(self, spec: NetworkSpec) -> Network:
        """Raises BackendUnavailable when no plan fits, BundleError when one was altered, BackendError."""
        if isinstance(spec, StreamedSpec):
            segments = self.bundle.segments(spec)
            for segment in segments:
                fitting_plan(self.bundle, segment, self.host)  # now, not in the middle of a call
            return SegmentedDecoder(spec, segments, self)
        return self._opened(spec, None)

    def open_streaming(self, spec: NetworkSpec, held_bytes: int) -> TrtNetwork:
        """As `open`, with `held_bytes` on the GPU for weights that stay and for those in passing.

        Its launches are not recorded: copies of weights cannot be part of a CUDA graph.
        """
        return self._opened(spec, held_bytes)

    def _opened(self, spec: NetworkSpec, held_bytes: int | None) -> TrtNetwork:
        plan = fitting_plan(self.bundle, spec, self.host)
        with self.cuda.selected():
            engine = self._engine(plan)
            self._check_table(spec, plan, engine)
            if plan.stripped:
                refit(engine, self.bundle.graph(spec, "tensorrt"), plan.file, self._rebuild)
            detail = f"{self.flavour.title} {plan.version}, {plan.file}"
            if held_bytes is not None:
                streamed = self._streamed(spec, plan, engine, held_bytes)
                detail += f", {size(streamed)} of weights streamed in each run"
            record = self.graphs and spec.network in RECORDED and held_bytes is None
            context, jit = self._context(plan, engine, record)
            placement = Placement(self.name, str(self.device), str(plan.precision), detail)
            return TrtNetwork(
                spec, placement, engine, context, self.cuda, self.memory, record and jit is None, jit
            )

    def close(self) -> None:
        """After the networks."""
        self._runtime = None

    @property
    def _rebuild(self) -> str:
        return build_remedy(self.bundle, self.host)

    def _engine(self, plan: PlanEntry) -> tensorrt.ICudaEngine:
        runtime, content = self._loader(plan), self.bundle.read_plan(plan)
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            why = f"; {invalidity(runtime, content)}" if self.flavour.compiles_at_first_launch else ""
            raise self._loading(plan, "an engine", why)
        return engine

    def _streamed(
        self, spec: NetworkSpec, plan: PlanEntry, engine: tensorrt.ICudaEngine, held_bytes: int
    ) -> int:
        """Bytes of weights in each run, as the engine is told here, before its context is made."""
        streamed = stream_weights(engine, spec.key, weight_bytes(self.bundle, spec, plan), held_bytes)
        if streamed is None:
            raise self._loading(plan, "weights that stream")
        return streamed

    def _loader(self, plan: PlanEntry) -> tensorrt.Runtime:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = library(self.flavour)

        if self._runtime is None:
            try:
                self._runtime = trt.Runtime(log(self.flavour))
            except TypeError as error:  # how its bindings say that the library gave none
                raise BackendUnavailable(
                    f"{self.flavour.title} {plan.version} on {self.device}",
                    expected="a runtime",
                    got=log(self.flavour).errors_so_far(),
                    remedy="Check the NVIDIA driver with nvidia-smi; it must know TensorRT's CUDA version.",
                ) from error
        return self._runtime

    def _context(
        self, plan: PlanEntry, engine: tensorrt.ICudaEngine, record: bool
    ) -> tuple[tensorrt.IExecutionContext, Jit | None]:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = library(self.flavour)

        jit = None
        if self.flavour.compiles_at_first_launch:
            context, jit = jit_context(engine, self._kernels(plan), record)
        else:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._loading(plan, "an execution context")
        return context, jit

    def _kernels(self, plan: PlanEntry) -> JitCache | None:
        if self.jit_cache is None:
            return None
        return cache_of(
            self.jit_cache, self.bundle.manifest.files[plan.file].sha256, self.host, driver_version()
        )

    def _loading(self, plan: PlanEntry, expected: str, more: str = "") -> BackendError:
        said = log(self.flavour).errors_so_far() + more
        return BackendError(
            f"{self.flavour.title} {plan.version} loading {plan.file} on {self.device}",
            expected=expected,
            got=said,
            remedy=remedy(said, self._rebuild),
        )

    def _check_table(self, spec: NetworkSpec, plan: PlanEntry, engine: tensorrt.ICudaEngine) -> None:
        """The buffers are made from the tensor table, so the engine must agree with every row of it."""
        wanted = sorted([*(f"input {t}" for t in spec.inputs), *(f"output {t}" for t in spec.outputs)])
        got = sorted(_rows(engine))
        if got != wanted:
            raise BackendError(
                f"tensors of {plan.file}",
                expected=", ".join(wanted),
                got=", ".join(got),
                remedy=self._rebuild,
            )


def remedy(said: str, otherwise: str) -> str:
    """TensorRT reports exhausted memory in words alone."""
    return LESS_MEMORY if re.search("out ?of ?memory", said, re.IGNORECASE) else otherwise


def _rows(engine: tensorrt.ICudaEngine) -> list[str]:
    """An engine's inputs and outputs, as a tensor table would have them."""
    rows = []
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        dtype, dims = engine.get_tensor_dtype(name).name, engine.get_tensor_shape(name)
        shape = tuple(dims[axis] for axis in range(len(dims)))
        tensor = TensorSpec(name, shape, DTYPE_NAMES.get(dtype, dtype))
        place = "" if engine.get_tensor_location(name).name == "DEVICE" else " on the host"
        rows.append(f"{engine.get_tensor_mode(name).name.lower()} {tensor}{place}")
    return rows
