"""Holds a bundle's graphs against what TensorRT takes and runs fast.  Reads graphs, never weights.

TensorRT's own words, at the end of minutes of building, are worse than these:

    operators, types, opset   in TensorRT's table (`tensorrt_ops`)
    no float64                TensorRT narrows it, if it can
    no integer arithmetic     nothing but constants is an integer, so that all shapes are known
    static shapes             of every tensor inside
    attention                 the operator where the compiler has a kernel for it, else products around a
                              softmax; anything else is a finding
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
from svd_export.tensorrt_ops import TensorRTRelease


@dataclass(frozen=True)
class GraphReport:
    operators: int
    kinds: int
    fused: dict[int, int]  # attention in one kernel: width of a head -> how many
    apart: dict[int, int]  # attention whose scores are written: width of a head -> how many
    findings: tuple[str, ...]

    @property
    def attentions(self) -> dict[int, int]:
        """Width of a head -> how many, in either form."""
        return dict(Counter(self.fused) + Counter(self.apart))


def check_graph(path: Path, version: TensorRTRelease, target: str | None = None) -> GraphReport:
    """What would keep TensorRT `version` from building the graph at `path` for a card of `target` ("sm75").

    Without a target, for any card.
    """
    model = onnx.load(str(path), load_external_data=False)
    findings = [*_opset(model, version), *_external(model, path.parent)]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = Graph(inferred.graph)
    fused: Counter[int] = Counter()
    apart: Counter[int] = Counter()
    for node in graph.nodes:
        findings += [f"{_name(node)}: {what}" for what in _node(node, graph, version)]
        if node.op_type in ("Attention", "Softmax"):
            width = attention_width(node, graph)
            if width is None:
                findings.append(f"{_name(node)}: a softmax between products in a form that is not known here")
            else:
                (fused if _fuses(node, width, graph) else apart)[width] += 1
        findings += [f"{_name(node)}: {what}" for what in _card(node, graph, target)]
    findings += list(_tensors(graph))
    kinds = {node.op_type for node in graph.nodes}
    return GraphReport(len(graph.nodes), len(kinds), dict(fused), dict(apart), tuple(findings))


def _opset(model: Any, version: TensorRTRelease) -> Iterator[str]:
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


def _node(node: Any, graph: Graph, version: TensorRTRelease) -> Iterator[str]:
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
        if name in node.input[:3] and len(graph.shape_of(name) or ()) not in table.ATTENTION_DIMENSIONS:
            yield f"its input {name} has neither 3 nor 4 dimensions"
    for attribute in node.attribute:
        if attribute.name in table.ATTENTION_WITHOUT and (attribute.i or attribute.f):
            yield f"has {attribute.name}, which TensorRT does not take"
    kind, width = graph.type_of(node.input[0]), attention_width(node, graph)
    if width is not None and not _fuses(node, width, graph):
        yield (
            f"of type {kind} and heads {width} wide: TensorRT has kernels for half precision and heads of "
            f"{table.FUSED_HEADS[0]} to {table.FUSED_HEADS[-1]}, and builds others in some surroundings only"
        )


def _fuses(node: Any, width: int, graph: Graph) -> bool:
    """Whether an Attention, or the products around a Softmax, become one kernel."""
    if node.op_type == "Attention":
        kind = graph.type_of(node.input[0])
    else:
        kind = graph.type_of(graph.maker(node.input[0]).output[0])  # of the scores, before a cast
    return kind in table.FUSED_TYPES and width in table.FUSED_HEADS


def _card(node: Any, graph: Graph, target: str | None) -> Iterator[str]:
    kind = graph.type_of(node.input[0]) if node.input else None
    if kind in table.NOT_ON.get(target or "", ()):
        yield f"of type {kind}, which TensorRT for RTX does not build for {target}"


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
