"""Plans for `tensorrt_double`, and bundles that list them: JSON with a network's table."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from svd_engine.backends.choose import Choice
from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.backends.tensorrt.refit import graph_weights
from svd_engine.bundle.flavours import Host, Target, card_target
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.plans import plan_file
from svd_engine.bundle.reading import Bundle
from svd_engine.spec.tensors import NetworkSpec
from tests.support import damage, tensorrt_double
from tests.support.tensorrt_double import CAPABILITY, GPU, VERSION

HOST = Host("tensorrt", VERSION, GPU, CAPABILITY)


def plan_of(
    spec: NetworkSpec,
    device_memory: int = 1024,
    weights: Mapping[str, str] | None = None,
    streamable: int = 0,
    scratch: int = 0,
) -> dict[str, Any]:
    """A plan of a network's table; with `weights`, their TensorRT types by name, it is a stripped one.

    streamable: bytes of weights that can stream.  scratch: bytes of a context for them, while any do.
    """
    rows = [("INPUT", t) for t in spec.inputs] + [("OUTPUT", t) for t in spec.outputs]
    return {
        "key": spec.key,
        "tensors": {
            t.name: {"mode": mode, "dtype": "FLOAT", "shape": t.shape, "location": "DEVICE"}
            for mode, t in rows
        },
        "device_memory": device_memory,
        "weights": weights or {},
        "streamable": streamable,
        "scratch": scratch,
        "stripped": weights is not None,
    }


def specs(folder: Path) -> list[NetworkSpec]:
    """Every network of a bundle, in the order in which its profiles call them."""
    bundle = Bundle(folder)
    return list(dict.fromkeys(chain(*map(bundle.specs_of, bundle.manifest.profiles))))


def denoiser(folder: Path) -> NetworkSpec:
    return next(spec for spec in specs(folder) if spec.network == "denoiser")


def add_plan(
    folder: Path,
    spec: NetworkSpec,
    plan: dict[str, Any] | None = None,
    host: Host = HOST,
    target: Target | None = None,
    **entry: Any,
) -> PlanEntry:
    """Writes a plan into a bundle and lists it, for the card of `host` or for `target`; `entry` replaces
    fields of its row."""
    bundle = Bundle(folder)
    plan, target = plan or plan_of(spec), target or card_target(host)
    network, files = bundle.entry(spec), bundle.manifest.files
    row = PlanEntry.model_validate(
        {
            "network": spec.key,
            "file": plan_file(spec.key, host.flavour, host.version, target, spec.precision),
            "flavour": host.flavour,
            "version": host.version,
            "target": target,
            "precision": spec.precision,
            "graph_sha256": files[bundle.graph_name(spec, "tensorrt")].sha256,
            "weights_sha256": files[network.weights].sha256,
            "stripped": plan["stripped"],
            "refittable": plan["stripped"],
            "optimization_level": 3,
            "workspace_bytes": 8 * 2**30,
            "device_memory_bytes": plan["device_memory"],
            "compiled": None,
            **entry,
        }
    )
    (folder / row.file).write_bytes(json.dumps(plan).encode())
    damage.trust(folder, row.file)
    damage.edit(folder, lambda m: m.setdefault("plans", []).append(row.model_dump(mode="json")))
    return row


def add_plans(folder: Path) -> None:
    """One for every network, each with another need of memory."""
    for number, spec in enumerate(specs(folder), 1):
        add_plan(folder, spec, plan_of(spec, device_memory=1000 * number))


def add_streaming_plans(folder: Path, scratch: int = 100) -> None:
    """As `add_plans`, of weights that can all stream, with `scratch` bytes for those in passing."""
    for number, spec in enumerate(specs(folder), 1):
        bundle = Bundle(folder)
        weights = bundle.manifest.files[bundle.entry(spec).weights].bytes
        plan = plan_of(spec, 1000 * number, streamable=weights, scratch=scratch)
        add_plan(folder, spec, plan, least_weight_bytes=scratch)


def weight_types(graph: Path) -> dict[str, str]:
    """TensorRT's types of a graph's weights, as a stripped plan of it lists them."""
    types = {
        "FLOAT": "FLOAT",
        "FLOAT16": "HALF",
        "BFLOAT16": "BF16",
        "INT64": "INT64",
        "INT32": "INT32",
        "BOOL": "BOOL",
    }
    return {name: types[kind] for name, kind, _ in graph_weights(graph)}


def with_onnxruntime(
    folder: Path, monkeypatch: pytest.MonkeyPatch, add: Callable[[Path], None] = add_plans
) -> Any:
    """The double, computing what ONNX Runtime does of the bundle in `folder`; engines choose TensorRT.

    add: writes the plans.
    """
    damage.edit(
        folder, lambda m: [e["graphs"].update(tensorrt=e["graphs"]["onnxruntime"]) for e in m["networks"]]
    )
    add(folder)
    double = tensorrt_double.install(monkeypatch)
    backend = OrtBackend(Bundle(folder), torch.device("cpu"))
    networks = {spec.key: backend.open(spec) for spec in specs(folder)}
    double.compute = lambda key, inputs: networks[key](**inputs)
    choice = Choice("tensorrt", backend.device, "asked for")
    monkeypatch.setattr("svd_engine.residency.source.choose_for_bundle", lambda *_: choice)
    return double
