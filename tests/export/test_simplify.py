"""What is left of a traced graph: all that the exporter's whole list of patterns would leave."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions

from svd_engine.arguments import dtype_name
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_export import forms, to_onnx
from svd_export.simplify import simplify
from svd_export.to_onnx import trace
from svd_export.unroll import unroll


def lines(model: ir.Model) -> Iterator[tuple[Any, ...]]:
    """Each node; a small constant is told by what it holds, for equal ones are one of any name."""

    def told(value: ir.Value | None) -> object:
        if value is None or not value.is_initializer() or value.const_value is None:
            return value and value.name
        small = value.const_value.size <= 8
        return value.const_value.numpy().tolist() if small else value.name

    for node in model.graph:
        attributes = {name: str(attribute) for name, attribute in node.attributes.items()}
        yield node.op_type, [told(v) for v in node.inputs], [v.name for v in node.outputs], attributes
    yield len(model.graph.initializers), len(model.functions)


@pytest.mark.parametrize(("network", "dtype"), [("vae_decoder", torch.float32), ("denoiser", torch.float16)])
def test_as_the_exporter_leaves_it(
    tiny_checkpoint: Path, network: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lists of patterns, after the same trace."""
    traced: list[ir.Model] = []

    def kept(model: ir.Model) -> None:
        traced.append(model.clone())
        simplify(model)

    monkeypatch.setattr(to_onnx, "simplify", kept)
    checkpoint = open_checkpoint(tiny_checkpoint)
    architecture, precision = checkpoint.model.architecture, Precision.of(dtype_name(dtype))
    modules = Modules(checkpoint, rewrites=rewrites_for("onnxruntime", forms.device_of(dtype)))
    specs = specs_of(Profile(2, 64, 64), architecture, precision)
    spec = next(spec for spec in specs if spec.network == network)
    ours, theirs = trace(modules.network(spec), spec), traced.pop()
    optimizer.optimize_ir(theirs)
    onnx_fusions.fuse(theirs)
    unroll(theirs)
    pairs = zip_longest(lines(ours), lines(theirs))
    assert next((pair for pair in pairs if pair[0] != pair[1]), None) is None
