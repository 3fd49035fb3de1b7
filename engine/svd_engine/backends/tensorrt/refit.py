"""Gives a stripped TensorRT engine its weights, from the file that all plans of its network share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from svd_engine.backends.tensorrt.library import log
from svd_engine.bundle.flavours import TENSORRT
from svd_engine.errors import BackendError, BundleError

if TYPE_CHECKING:
    import tensorrt

RawBytes = np.ndarray[Any, np.dtype[np.uint8]]


def refit(engine: tensorrt.ICudaEngine, graph: Path, plan: str, remedy: str) -> None:
    """`graph`: the ONNX graph that the plan was built from, its external data checked; weights are mapped,
    not read, so the host holds no copy.

    Raises BackendError with TensorRT's words when the engine lacks weights or refuses one, BundleError
    when the file of weights is too short.
    """
    import tensorrt as trt

    types = {
        "FLOAT": (trt.DataType.FLOAT, 4),
        "FLOAT16": (trt.DataType.HALF, 2),
        "BFLOAT16": (trt.DataType.BF16, 2),
        "INT64": (trt.DataType.INT64, 8),
        "INT32": (trt.DataType.INT32, 4),
        "BOOL": (trt.DataType.BOOL, 1),
    }
    try:
        refitter = trt.Refitter(engine, log(TENSORRT))
    except TypeError as error:  # how its bindings say that the library gave none
        raise BackendError(
            f"refitting {plan}",
            expected="an engine whose weights can be set",
            got=log(TENSORRT).errors_so_far(),
            remedy=remedy,
        ) from error
    wanted = set(refitter.get_all_weights())
    held: list[RawBytes] = []  # TensorRT reads them in refit_cuda_engine
    refused: list[str] = []
    for name, kind, content in graph_weights(graph):
        if name in wanted and kind in types:
            dtype, size = types[kind]
            held.append(content)
            weights = trt.Weights(dtype, content.ctypes.data, len(content) // size)
            if not refitter.set_named_weights(name, weights):
                refused.append(name)
    missing = list(refitter.get_missing_weights())
    if refused or missing or not refitter.refit_cuda_engine():
        names = [f"{name} (refused)" for name in refused] + [f"{name} (missing)" for name in missing]
        raise BackendError(
            f"refitting {plan} from {graph.name}",
            expected="all of its weights",
            got="; ".join([*names[:5], log(TENSORRT).errors_so_far()]),
            remedy=remedy,
        )


def graph_weights(graph: Path) -> Iterator[tuple[str, str, RawBytes]]:
    """Name, ONNX type and bytes of every weight of a graph: initializers, and the values of Constant nodes
    under their output's name, as TensorRT's parser names them."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    files: dict[str, RawBytes] = {}
    model = onnx.load(str(graph), load_external_data=False)
    named = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type == "Constant":
            named += [(node.output[0], a.t) for a in node.attribute if a.name == "value"]
    for name, tensor in named:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            if info.location not in files:
                files[info.location] = np.memmap(graph.parent / info.location, np.uint8, "r")
            content = files[info.location][info.offset or 0 :][: info.length]
            if len(content) != info.length:
                raise BundleError(
                    f"weight {name} of {graph}",
                    expected=f"{info.length} bytes at {info.offset} of {info.location}",
                    got=f"{len(content)} bytes",
                    remedy="Export the bundle again.",
                )
        else:
            content = np.frombuffer(onnx.numpy_helper.to_array(tensor).tobytes(), np.uint8)
        yield name, kind, content
