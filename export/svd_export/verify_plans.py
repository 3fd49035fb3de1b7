"""Holds each TensorRT plan of a bundle against ONNX Runtime: same graph, same inputs, by Polygraphy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svd_engine.backends.tensorrt.library import host
from svd_engine.bundle.flavours import Flavour
from svd_engine.bundle.manifest import NetworkEntry, ParityEntry
from svd_engine.bundle.plans import build_command, fitting_plan
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable, ParityError
from svd_engine.networks.parity import example_inputs
from svd_export.tensorrt_builder import load_polygraphy
from svd_export.verify import differences


def verify_plans(
    bundle: Bundle, flavour: Flavour, device: torch.device, progress: Callable[[str], None]
) -> list[ParityEntry]:
    """Runs every network on ONNX Runtime on the CPU and as the plan that fits `device`.

    Allowed is what `parity.TOLERANCES` allows the bundle's precision, relative to the reference's largest
    value.  Raises BackendUnavailable without a GPU, the flavour or a plan that fits; ParityError beyond
    tolerance; NonFiniteOutput when a network gives NaN.
    """
    if device.type != "cuda":
        raise BackendUnavailable(
            f"verifying {flavour.title} plans",
            expected="a CUDA GPU that the plans were built for",
            got=f"device {device}",
            remedy="Copy the bundle to a machine with such a GPU and run the same command there; "
            'backend="onnxruntime" verifies the graphs here.',
        )
    here = host(flavour, device)
    load_polygraphy(flavour)
    rows: list[ParityEntry] = []
    for entry in bundle.manifest.networks:
        progress(entry.spec.key)
        plan = bundle.read_plan(fitting_plan(bundle, entry.spec, here))
        with torch.cuda.device(device):
            reference, got = outputs(bundle, entry, plan)
        rows += differences(entry, f"{flavour.title} {here.version} {device}", got, reference)
    for row in rows:
        if not row.relative <= row.tolerance:  # written so that NaN fails
            raise ParityError(
                f"{row.output} of network {row.network} on {row.backend}",
                expected=f"a difference of at most {row.tolerance:g} of ONNX Runtime's largest value",
                got=f"{row.relative:g} (max abs {row.max_abs:g}, cosine {row.cosine:.6f})",
                remedy=f'Build the plan again ({build_command(bundle, here)}), or export with dtype="bf16".',
            )
    return rows


Outputs = dict[str, Tensor]


def outputs(bundle: Bundle, entry: NetworkEntry, plan: bytes) -> tuple[Outputs, Outputs]:
    """Of ONNX Runtime and of the plan, on the same inputs; by name."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.comparator import Comparator

    inputs = example_inputs(entry.spec, bundle.manifest.model.architecture.conditioning)
    feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    runners = [
        OnnxrtRunner(SessionFromOnnx(str(bundle.graph(entry.spec, "onnxruntime")), providers=["cpu"])),
        TrtRunner(EngineFromBytes(plan)),
    ]
    results: Any = Comparator.run(runners, data_loader=[feed])
    names = [tensor.name for tensor in entry.spec.outputs]
    reference, got = ({n: torch.from_numpy(run[0][n]) for n in names} for _, run in results.items())
    return reference, got
