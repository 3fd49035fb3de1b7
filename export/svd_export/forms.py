"""Which ONNX a network becomes, and what is settled on the graph after tracing.  One decision in one place.

`svd-export onnx --form` switches it:

    attention    opset 23.  Attention is one operator: a runtime with a fused kernel never builds the 9,216 x
                 9,216 scores of SVD's first level.  GroupNormalization is taken apart (see `primitives`):
                 ONNX Runtime has no kernel for it, and the definition that it falls back to sums squares in
                 float32, makes some ten tensors of the input's size, and is ten times less exact where the
                 mean is three deviations.  ONNX Runtime from 1.23, TensorRT from 10.14.
    operators    opset 23.  GroupNormalization is one operator too: to be tried on TensorRT, from 10.14.
    primitives   opset 20.  Both are taken apart: TensorRT from 10.12, which looks for the patterns and fuses
                 them.
    cpu          as attention, of networks that ORT_CPU_REWRITES shaped as well: for ONNX Runtime on a CPU.
                 It runs elsewhere too, but nothing has shown that it pays there.

Networks are traced as `operators` whichever form they take, so nothing else differs between the first three.
  Half precision
networks keep their float32 islands by the operators' own definition, without casts, where those are whole:

    LayerNormalization, GroupNormalization   stash_type 1 (the default): statistics in float32
    Attention                                softmax_precision 1: softmax in float32

The scale of attention is applied to both factors before their product (Attention-23), so float16
products of large keys do not overflow.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from svd_engine.manifest import Form
from svd_engine.networks.rewrites import Rewrite, rewrites_for
from svd_export.primitives import take_apart

OPSETS: dict[Form, int] = {"attention": 23, "operators": 23, "primitives": 20, "cpu": 23}
APART: dict[Form, tuple[str, ...]] = {
    "attention": ("GroupNormalization",),
    "operators": (),
    "primitives": ("GroupNormalization", "Attention"),
    "cpu": ("GroupNormalization",),
}
TRACED = 23  # opset
UNUSED = ("is_causal", "qk_matmul_output_mode", "softcap")  # of Attention; TensorRT knows not all of them


def default_form(dtype: torch.dtype) -> Form:
    """float32 is what runs on a CPU."""
    return "cpu" if dtype == torch.float32 else "attention"


def rewrites_of(form: Form) -> tuple[Rewrite, ...]:
    """What a network of that form has been through before it is traced."""
    return rewrites_for("onnxruntime", "cpu" if form == "cpu" else "cuda")


def settle(model: ir.Model, form: Form) -> None:
    """Edits a traced model in place: its form, boundary names kept free, no traces of its maker."""
    model.producer_name = "svd-engine"
    model.producer_version = None
    graph = model.graph
    for node in graph:
        if node.op_type == "Attention":
            _settle_attention(node)
    take_apart(graph, APART[form])
    graph.opset_imports[""] = OPSETS[form]
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
