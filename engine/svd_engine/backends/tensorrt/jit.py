"""What TensorRT for RTX adds to running a plan: a JIT compiler on the card, and a word on why one cannot run.

CUDA graphs are its own here (`WHOLE_GRAPH_CAPTURE`): a launch of a plan that was built without user
allocation may not be captured from outside, and its runtime knows when kernels are still to be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from svd_engine.backends.tensorrt.jit_cache import JitCache, notices

if TYPE_CHECKING:
    import tensorrt_rtx


@dataclass
class Jit:
    """The kernels that the JIT compiler makes for one network, and the file that keeps them."""

    kernels: tensorrt_rtx.IRuntimeCache
    cache: JitCache | None  # None: nothing is kept
    known: int = 0  # bytes that the file held
    is_warm: bool = False  # a launch has compiled what it needs

    def settle(self) -> None:
        """After a launch: keeps what it compiled, once."""
        if self.is_warm:
            return
        self.is_warm = True
        if self.cache is not None:
            compiled = self.kernels.serialize()
            content = b"" if compiled is None else bytes(memoryview(cast(Any, compiled)))
            if content and len(content) != self.known:
                self.cache.write(content)


def jit_context(
    engine: tensorrt_rtx.ICudaEngine, cache: JitCache | None, graphs: bool
) -> tuple[tensorrt_rtx.IExecutionContext | None, Jit]:
    """A context whose activations the caller allocates, with the kernels that `cache` holds.

    graphs: launches are captured and replayed.  The context is None when there is none; the log says why.
    """
    import tensorrt_rtx as trt

    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.cuda_graph_strategy = (
        trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else trt.CudaGraphStrategy.DISABLED
    )
    kernels = config.create_runtime_cache()
    kept = b"" if cache is None else cache.read()
    if kept and not kernels.deserialize(kept):
        notices.warning("JIT cache is of another machine or driver: kernels are compiled anew")
        kept = b""
    if not config.set_runtime_cache(kernels):
        notices.warning("TensorRT for RTX did not take its JIT cache: nothing is kept")
        cache = None
    return engine.create_execution_context(config), Jit(kernels, cache, len(kept))


def invalidity(runtime: tensorrt_rtx.Runtime, plan: bytes) -> str:
    """Why the library says that a plan cannot run on the current GPU; empty when it can."""
    import tensorrt_rtx as trt

    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return ""
    causes = [
        name.lower().replace("_", " ")
        for name, cause in trt.EngineInvalidityDiagnostics.__members__.items()
        if int(diagnostics) & int(cause)
    ]
    return ", ".join(causes) or "invalid, without a reason"
