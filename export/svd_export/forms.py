"""The ONNX form of a network: what is settled on a graph after tracing, for each runtime that takes it.

No one form suits both runtimes, so a half-precision bundle holds two graphs of each network over the same
weights, each under a megabyte, and its manifest says which is whose.  Both are opset 23:

                        onnxruntime (from 1.23)                  tensorrt (from 10.14, and for RTX)
    GroupNormalization  taken apart: there is no kernel for it,  one operator: one kernel, SiLU with it;
                        and the definition it falls back to      instance normalisation in float32 writes a
                        sums squares in one pass                 float32 copy, twice
    Attention           one operator                             one operator where the compiler has a kernel
                                                                 (`fuses`), else products
    softmax_precision   float32                                  not said: the parser refuses it

In the decoder's for TensorRT the first normalisation of each temporal half is apart (`turned_norms`).
`svd-bench forms` compiles the candidates; docs/tensorrt.md has their figures, and says why both are one trace
of one list of rewrites.  float32 is what runs on a CPU: such bundles are shaped for it
(`rewrites_for("onnxruntime", "cpu")`) and hold ONNX Runtime's graph only.

What keeps statistics and softmax in float32 where the network is in half precision:

    LayerNormalization, GroupNormalization   stash_type 1 (the default)
    Attention, onnxruntime                   softmax_precision 1
    Attention, tensorrt                      the fused kernel: its scores and its softmax are float32
    taken apart                              casts

The scale of attention is applied to both factors before their product (Attention-23), so float16
products of large keys do not overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import onnx_ir as ir
import torch

from svd_engine.bundle.manifest import Runtime
from svd_engine.spec.streaming import SEGMENT
from svd_export.primitives import take_apart
from svd_export.tensorrt_ops import FUSED_HEADS, FUSED_TYPES
from svd_export.turned_norms import split_turned_norms

OPSET = 23
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
TURNED = ("vae_decoder", SEGMENT)  # in the denoiser it saves 0.7 % of the traffic, with 29 kernels more
UNUSED = ("is_causal", "qk_matmul_output_mode", "softcap")  # of Attention; TensorRT knows not all of them


def runtimes_of(dtype: torch.dtype) -> tuple[Runtime, ...]:
    """Those that a bundle of that type holds graphs for."""
    return ("onnxruntime",) if dtype == torch.float32 else RUNTIMES


def device_of(dtype: torch.dtype) -> str:
    """Where a bundle of that type runs, as `rewrites_for` names it."""
    return "cpu" if dtype == torch.float32 else "cuda"


def settle(model: ir.Model) -> None:
    """Edits a traced model in place: boundary names kept free, nothing said where the default is meant,
    no traces of its maker."""
    model.producer_name = "svd-engine"
    model.producer_version = None
    graph = model.graph
    for node in _all(graph, "Attention"):
        for name in UNUSED:
            if name in node.attributes and not node.attributes[name].value:
                del node.attributes[name]
    boundary = {value.name for value in (*graph.inputs, *graph.outputs)}
    constants = tuple(graph.initializers.values())
    inside = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    for value in (*constants, *inside):
        if value.name in boundary:  # a module of the network has the name of an input or output
            value.name = f"inner_{value.name}"
    for part in (model, graph, *graph, *graph.inputs, *constants, *(v for n in graph for v in n.outputs)):
        part.metadata_props.clear()  # the exporter's stack traces name source paths


def shape_for(runtime: Runtime, network: str, graph: ir.Graph) -> None:
    """Gives the settled graph of a network of the tables the form that `runtime` wants, in place."""
    if runtime == "onnxruntime":
        for node in _all(graph, "Attention"):
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", ir.DataType.FLOAT.value)
        take_apart(graph, list(_all(graph, "GroupNormalization")))
    else:
        take_apart(graph, [node for node in _all(graph, "Attention") if not fuses(node)])
        if network in TURNED:
            split_turned_norms(graph)


def fuses(attention: ir.Node) -> bool:
    """Whether TensorRT's compiler has a kernel for an Attention: half precision, heads 9 to 256 wide.

    The others (the VAE's one head of 512; the VAE encoder in float32) it builds in some surroundings only.
    """
    q = attention.inputs[0]
    assert q is not None
    assert q.shape is not None
    assert q.dtype is not None
    return q.dtype.name in FUSED_TYPES and int(q.shape[-1]) in FUSED_HEADS


def _all(graph: ir.Graph, operator: str) -> Iterator[ir.Node]:
    return (node for node in graph if node.op_type == operator)
