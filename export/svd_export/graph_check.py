"""Holds a bundle's graphs against what TensorRT takes and runs fast.  Reads graphs, never weights.

TensorRT's own words, at the end of minutes of building, are worse than these:

    operators, types, opset   in TensorRT's table (`tensorrt_ops`)
    no float64                TensorRT narrows it, if it can
    no integer arithmetic     nothing but constants is an integer, so that all shapes are known
    static shapes             of every tensor inside
    attention                 the operator, or the pattern that TensorRT fuses; anything else is a finding
    external data             where the graph says, as long as it says
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from svd_export import tensorrt_ops as table
from svd_export.attention_pattern import Graph, attention_width
from svd_export.tensorrt_ops import Version


@dataclass(frozen=True)
class GraphReport:
    operators: int
    kinds: int
    attentions: dict[int, int]  # in a form that fuses: width of a head -> how many
    findings: tuple[str, ...]


def check_graph(path: Path, version: Version) -> GraphReport:
    """What would keep TensorRT `version` from building the graph at `path`, or from fusing its attention."""
    model = onnx.load(str(path), load_external_data=False)
    findings = [*_opset(model, version), *_external(model, path.parent)]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = Graph(inferred.graph)
    attentions: Counter[int] = Counter()
    for node in graph.nodes:
        findings += [f"{_name(node)}: {what}" for what in _node(node, graph, version)]
        if node.op_type in ("Attention", "Softmax"):
            width = attention_width(node, graph)
            if width is None:
                findings.append(f"{_name(node)}: attention in a form that TensorRT does not fuse")
            else:
                attentions[width] += 1
    findings += list(_tensors(graph))
    kinds = {node.op_type for node in graph.nodes}
    return GraphReport(len(graph.nodes), len(kinds), dict(attentions), tuple(findings))


def _opset(model: Any, version: Version) -> Iterator[str]:
    low, high = table.OPSET_LIMITS[version]
    for item in model.opset_import:
        if item.domain not in ("", "ai.onnx"):
            yield f"operators of the domain {item.domain}"
        elif not low <= item.version <= high:
            yield f"opset {item.version}, and TensorRT {version} takes {low} to {high}"


def _external(model: Any, folder: Path) -> Iterator[str]:
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            place = folder / info.location
            end = (info.offset or 0) + (info.length or 0)
            if not place.is_file() or place.stat().st_size < end:
                yield f"weight {tensor.name}: no bytes up to {end} in {info.location}"


def _node(node: Any, graph: Graph, version: Version) -> Iterator[str]:
    op = node.op_type
    if not table.supported(op, version):
        since = table.SINCE.get(op)
        yield f"TensorRT {version} has no such operator" + (f", {since} has" if since else "")
        return
    kind = graph.type_of(node.input[0]) if node.input else None
    if kind not in (None, *table.TYPES[op]):
        yield f"of type {kind}, and TensorRT takes {', '.join(sorted(table.TYPES[op]))}"
    position = table.CONSTANT_INPUTS.get(op)
    if position is not None and len(node.input) > position and node.input[position] not in graph.constants:
        yield f"its input {node.input[position]} is computed, and TensorRT wants a constant"
    if op in table.ONE_OUTPUT and any(node.output[1:]):
        yield "has a second output, which TensorRT does not make"
    if op == "Attention":
        yield from _attention(node, graph)


def _attention(node: Any, graph: Graph) -> Iterator[str]:
    if any(node.input[table.ATTENTION_INPUTS :]):
        yield "has keys and values of the past, which TensorRT does not take"
    for name in filter(None, node.input):
        if len(graph.shape_of(name) or ()) != table.ATTENTION_DIMENSIONS:
            yield f"its input {name} is not 4D"
    for attribute in node.attribute:
        if attribute.name in table.ATTENTION_WITHOUT:
            yield f"has {attribute.name}, which TensorRT does not take"


def _tensors(graph: Graph) -> Iterator[str]:
    for name in graph.values:
        kind, shape = graph.type_of(name), graph.shape_of(name)
        computed = name not in graph.constants
        if kind is None or shape is None:
            yield f"tensor {name}: a type or shape that cannot be inferred"
        elif kind not in table.TENSORS:
            yield f"tensor {name}: of type {kind}"
        elif kind in table.INTEGERS and computed:
            yield f"tensor {name}: an integer that is computed ({kind})"
        if shape is not None and None in shape:
            yield f"tensor {name}: a dynamic shape {list(shape)}"
        if shape is not None and len(shape) > table.MAX_DIMENSIONS:
            yield f"tensor {name}: {len(shape)} dimensions"


def _name(node: Any) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"
