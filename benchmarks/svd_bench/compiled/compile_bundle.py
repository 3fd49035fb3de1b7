"""A bundle's networks compiled, as they are or in each form that was a candidate for them."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from svd_bench.compiled.compiling import CompileCase, compiled_in_child
from svd_bench.compiled.document import CompiledDocument, CompiledNetwork
from svd_bench.measuring.environment import environment
from svd_bench.measuring.progress import Progress
from svd_engine.bundle.manifest import NetworkEntry
from svd_engine.bundle.reading import Bundle
from svd_export.compiled import capability, installed

if TYPE_CHECKING:
    import onnx_ir as ir

NormalisationForm = Literal["operator", "instance, float32", "instance, half"]
AttentionForm = Literal["operator", "products"]


def compile_bundle(
    folder: Path, target: str, networks: Collection[str] | None, progress: Progress
) -> CompiledDocument:
    """Network by network, each in a process of its own; None is all.

    Raises what `compiled_in_child` and `capability` do, BundleError without graphs for TensorRT, ProfileError
    for a network that is not there.
    """
    capability(target)  # refused before minutes are spent
    bundle = Bundle(folder)
    made = []
    for entry in bundle.entries(networks):
        progress(f"{entry.spec.key}: compiling for {target}")
        graph = bundle.graph(entry.spec, "tensorrt").absolute()
        made.append(compiled_in_child(CompileCase(network=entry.spec.key, graph=graph, target=target)))
    return document_of(bundle, target, made)


def keys_of(folder: Path, networks: Collection[str] | None) -> list[str]:
    """What `compile_bundle` would compile.  Raises as it does."""
    bundle = Bundle(folder)
    specs = [entry.spec for entry in bundle.entries(networks)]
    for spec in specs:
        bundle.graph_name(spec, "tensorrt")
    return [spec.key for spec in specs]


def compile_forms(folder: Path, target: str, network: str, progress: Progress) -> CompiledDocument:
    """Every form of the first graph of `network`.  Raises as `compile_bundle`.

    Attention that a bundle holds as products has no other form here.
    """
    capability(target)
    bundle = Bundle(folder)
    entry = next(e for e in bundle.manifest.networks if e.spec.network == network)
    made = []
    for normalisation in get_args(NormalisationForm):
        for attention in _attentions(bundle, entry):
            name = f"{entry.spec.key}: normalisation {normalisation}; attention {attention}"
            progress(f"{name}: compiling for {target}")
            with candidate(bundle, entry, normalisation, attention) as graph:
                made.append(compiled_in_child(CompileCase(network=name, graph=graph, target=target)))
    return document_of(bundle, target, made)


@contextmanager
def candidate(
    bundle: Bundle, entry: NetworkEntry, normalisation: NormalisationForm, attention: AttentionForm
) -> Iterator[Path]:
    """The graph for TensorRT with other forms of two operators, in a temporary folder.

    Normalisations that the graph has apart already, in the decoder's temporal halves, stay so in each.
    """
    import onnx_ir as ir

    from svd_export.primitives import PARTS, Parts, instance_normalization, take_apart

    model = ir.load(bundle.graph(entry.spec, "tensorrt"))
    if normalisation != "operator":
        inside = (
            ir.DataType.FLOAT
            if normalisation == "instance, float32"
            else ir.DataType[entry.spec.precision.activations.upper()]
        )
        parts: Parts = {**PARTS, "GroupNormalization": partial(instance_normalization, inside=inside)}
        take_apart(model.graph, _all(model, "GroupNormalization"), parts)
    if attention == "products":
        take_apart(model.graph, _all(model, "Attention"))
    with tempfile.TemporaryDirectory(prefix="svd-bench-") as name:
        weights, beside = (bundle.folder / entry.weights).absolute(), Path(name, entry.weights)
        try:
            beside.symlink_to(weights)
        except OSError:  # Windows lets few people make one
            shutil.copyfile(weights, beside)
        graph = Path(name, "graph.onnx")
        ir.save(model, graph)
        yield graph


def _attentions(bundle: Bundle, entry: NetworkEntry) -> Sequence[AttentionForm]:
    import onnx_ir as ir

    whole = bool(_all(ir.load(bundle.graph(entry.spec, "tensorrt")), "Attention"))
    return get_args(AttentionForm) if whole else ("products",)


def _all(model: ir.Model, operator: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == operator]


def document_of(bundle: Bundle, target: str, networks: Sequence[CompiledNetwork]) -> CompiledDocument:
    manifest = bundle.manifest
    return CompiledDocument(
        environment=environment(torch.device("cpu"), None, ["svd-bench", *sys.argv[1:]]),
        compiler=f"TensorRT for RTX {installed()}",
        target=target,
        model=manifest.model.name,
        random_weights=manifest.model.random_weights,
        dtype=manifest.precision.activations,
        networks=tuple(networks),
    )
