"""Which ONNX a network becomes, and what is settled on the graph after tracing.  One decision in one place.

The opset names the form; `svd-export onnx --opset` switches it:

    23   Attention and (from 21) GroupNormalization are single operators: a runtime with a fused kernel never
         builds the 9,216 x 9,216 scores of SVD's first level.  ONNX Runtime from 1.23, TensorRT from 10.14.
    20   Both are taken apart (see `primitives`): TensorRT from 10.12, which looks for the pattern and fuses
         it, and on which InstanceNormalization may be the faster normalisation.

Networks are traced at 23 whichever form they take, so nothing else differs.  Half precision networks keep
their float32 islands by the operators' own definition, without casts:

    LayerNormalization, GroupNormalization   stash_type 1 (the default): statistics in float32
    Attention                                softmax_precision 1: softmax in float32

The scale of attention is applied to both factors before their product (Attention-23), so float16
products of large keys do not overflow.
"""

from __future__ import annotations

from typing import Literal, get_args

import onnx_ir as ir

from svd_export.primitives import take_apart

Opset = Literal[23, 20]
OPSETS: tuple[Opset, ...] = get_args(Opset)
OPSET: Opset = 23  # the default, and that of tracing
UNUSED = ("is_causal", "qk_matmul_output_mode", "softcap")  # of Attention; TensorRT knows not all of them


def settle(model: ir.Model, opset: Opset = OPSET) -> None:
    """Edits a traced model in place: its form, boundary names kept free, no traces of its maker."""
    model.producer_name = "svd-engine"
    model.producer_version = None
    graph = model.graph
    for node in graph:
        if node.op_type == "Attention":
            _settle_attention(node)
    if opset < OPSET:
        take_apart(graph)
        graph.opset_imports[""] = opset
    boundary = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants = tuple(graph.initializers.values())
    inside = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in (*constants, *inside):
        if value.name in boundary:  # a module of the network has the name of an input or output
            value.name = f"inner_{value.name}"
    for part in (model, graph, *graph, *graph.inputs, *constants, *(v for n in graph for v in n.outputs)):
        part.metadata_props.clear()  # the exporter's stack traces name source paths


def _settle_attention(node: ir.Node) -> None:
    """Softmax in float32; nothing said where the default is meant."""
    node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
    for name in UNUSED:
        if name in node.attributes and not node.attributes[name].value:
            del node.attributes[name]
