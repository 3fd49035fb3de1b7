"""How much of an engine's weights stays on the GPU; the others stream from host memory in every launch.

For plans that were built with `BuilderFlag.WEIGHT_STREAMING`.  TensorRT chooses which weights stay.  What it
needs for those in passing (`weight_streaming_scratch_memory_size`) is part of a context's memory, which
`device_memory_size_v2` says once the budget is set.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from svd_engine.report import size

if TYPE_CHECKING:
    import tensorrt

notices = logging.getLogger("svd_engine.notices")


def stream_weights(engine: tensorrt.ICudaEngine, key: str, weight_bytes: int, held_bytes: int) -> int | None:
    """Sets the budget of an engine that has no context yet, and gives the bytes that stream in each launch.

    weight_bytes: of the whole network `key`; not all may be able to stream.  held_bytes: for the weights that
    stay on the GPU and for those in passing.  Where that is too little, all that can streams, which is said.
    None where TensorRT did not take the budget; its log says why.
    """
    streamable = engine.streamable_weights_size
    engine.weight_streaming_budget_v2 = 0  # the most streams: so much is needed in passing
    least = max(0, weight_bytes - streamable) + engine.weight_streaming_scratch_memory_size
    if least > held_bytes:
        notices.warning(
            "weights of %s take %s while they stream, planned were %s", key, size(least), size(held_bytes)
        )
    budget = min(max(0, held_bytes - least), streamable)
    engine.weight_streaming_budget_v2 = budget
    taken = streamable > 0 and engine.weight_streaming_budget_v2 <= budget
    return streamable - budget if taken else None


def least_weights(engine: tensorrt.ICudaEngine, plan_bytes: int) -> int:
    """Bytes on the GPU while all weights stream that can: the others, at most what else is in the plan, and
    those in passing."""
    engine.weight_streaming_budget_v2 = 0
    rest = max(0, plan_bytes - int(engine.streamable_weights_size))
    return rest + int(engine.weight_streaming_scratch_memory_size)
