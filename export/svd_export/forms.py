"""Which ONNX a network becomes: the opset, and what is settled on the graph after tracing.

One decision in one place.  Opset 23 has Attention and (from 21) GroupNormalization as single operators:
a runtime with a fused kernel never builds the 9,216 x 9,216 scores of SVD's first level, and half
precision networks keep their float32 islands by the operators' own definition, without casts:

    LayerNormalization, GroupNormalization   stash_type 1 (the default): statistics in float32
    Attention                                softmax_precision 1: softmax in float32

The scale of attention is applied to both factors before their product (Attention-23), so float16
products of large keys do not overflow.
"""

from __future__ import annotations

import onnx_ir as ir

OPSET = 23


def settle(model: ir.Model) -> None:
    """Edits a traced model in place: float32 softmax, boundary names kept free, no traces of its maker."""
    model.producer_name = "svd-engine"
    model.producer_version = None
    graph = model.graph
    boundary = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants = tuple(graph.initializers.values())
    inside = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in (*constants, *inside):
        if value.name in boundary:  # a module of the network has the name of an input or output
            value.name = f"inner_{value.name}"
    for node in graph:
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
    for part in (model, graph, *graph, *graph.inputs, *constants, *(v for n in graph for v in n.outputs)):
        part.metadata_props.clear()  # the exporter's stack traces name source paths
