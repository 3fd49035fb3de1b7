"""Where an ONNX graph's weights may lie.  Reads graphs without their weights, runs nothing.

A graph names the files of its weights itself, and a runtime that maps them follows any path, so a graph
that is not ours could read what lies outside its bundle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svd_engine.errors import BackendUnavailable, BundleError

if TYPE_CHECKING:
    import onnx

GRAPH_BYTES = 256 * 2**20  # of a file without its weights; SVD's largest is below one MiB


def read_graph(graph: Path) -> onnx.ModelProto:
    """The ModelProto of an ONNX file, its weights left where they are.

    Raises BundleError for an unreadable graph or one above GRAPH_BYTES, BackendUnavailable without onnx.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # comes with onnx
    except ImportError as error:
        raise BackendUnavailable(
            f"reading {graph.name}",
            expected="the package onnx",
            got="none installed",
            remedy="Run: pip install onnx",
        ) from error
    if (size := graph.stat().st_size) > GRAPH_BYTES:
        raise BundleError(
            f"graph {graph}",
            expected=f"at most {GRAPH_BYTES:,} bytes, its weights in another file",
            got=f"{size:,} bytes",
            remedy="Do not run this bundle; export one from the checkpoint.",
        )
    try:
        return onnx.load(str(graph), load_external_data=False)
    except DecodeError as error:
        raise BundleError(
            f"graph {graph}",
            expected="an ONNX model",
            got=str(error),
            remedy="Export the bundle again.",
        ) from error


def check_external_data(graph: Path, model: onnx.ModelProto, weights: str) -> None:
    """Weights may lie in the graph, or in the file `weights` beside it, and nowhere else.

    `model` is the graph's ModelProto.  Raises BundleError for another path.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    for tensor in _tensors(model, onnx.TensorProto):
        if not uses_external_data(tensor):
            continue
        locations = [item.value for item in tensor.external_data if item.key == "location"]
        if locations != [weights]:
            raise BundleError(
                f"tensor {tensor.name} in {graph}",
                expected=f"weights in {weights}",
                got=f"a path to {', '.join(map(repr, locations)) or 'nothing'}",
                remedy="Do not run this bundle; export one from the checkpoint.",
            )


def _tensors(message: Any, kind: type[onnx.TensorProto]) -> Iterator[onnx.TensorProto]:
    """Every TensorProto inside a message, wherever the format allows one: initializers, node attributes,
    subgraphs, functions, sparse tensors, training graphs."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in (value,) if hasattr(value, "ListFields") else value:
            if isinstance(inner, kind):
                yield inner
            yield from _tensors(inner, kind)
