"""How a video would be made within a memory budget, in words.  Opens no backend and reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from svd_engine.arguments import dtype_name, torch_dtype
from svd_engine.backends.registry import BACKENDS, check_name, names
from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import hides_frames, open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.report import size
from svd_engine.request import Settings, own_values
from svd_engine.residency.budget import NO_LIMIT, Memory, budget_of, check_memory
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.planning import planner_of_bundle, planner_of_checkpoint
from svd_engine.spec.model import Model
from svd_engine.spec.precision import Precision

USUAL = {
    (True, "cpu"): "onnxruntime",
    (True, "cuda"): "tensorrt",
    (False, "cpu"): "eager",
    (False, "cuda"): "compiled",
}


def planner_of(
    source: str,
    memory: Memory | None,
    backend: str,
    device: str,
    dtype: str,
    swap_networks: bool,
    asked: Mapping[str, Any],
) -> tuple[Planner, Settings]:
    """A planner of a bundle's folder or of a checkpoint that counts every call, and the call asked for.

    memory: None sets no limit.
    device: "cpu", "cuda" or "auto"; of memory in bytes no such device need be here.
    Raises SettingsError, BundleError, CheckpointError.
    """
    check_name(backend)
    check_memory(memory)
    where = _device(device, memory)
    is_bundle = (Path(source) / MANIFEST).is_file()
    chosen = USUAL[is_bundle, where.type] if backend == "auto" else backend
    if BACKENDS[chosen].of_bundle != is_bundle or where.type not in BACKENDS[chosen].devices:
        raise SettingsError(
            f"backend {chosen} on {where.type}",
            expected=f"one of {names(is_bundle)}, for what this is, on its device",
            got=chosen,
            remedy="Choose another backend or device.",
        )
    budget = NO_LIMIT if memory is None else budget_of(memory, where)
    if is_bundle:
        bundle = Bundle(source)
        own = bundle.manifest.profiles[0]
        settings = _settings(bundle.manifest.model, own.frames, own.height, own.width, asked)
        planner = planner_of_bundle(bundle, budget, chosen, where, swap_networks)
        return replace(planner, ceiling=None), settings
    checkpoint = open_checkpoint(source, frames=asked.get("frames") if hides_frames(source) else None)
    model = checkpoint.model
    settings = _settings(model, model.frames, model.height, model.width, asked)
    precision = Precision.of(dtype_name(torch_dtype(dtype, where)))
    planner = planner_of_checkpoint(checkpoint, budget, chosen, where, precision, (), swap_networks)
    return replace(planner, ceiling=None), settings


def table(planner: Planner, plan: Plan) -> str:
    """A plan: a line for each stage, then in one the plan and its budget."""
    rows = [("stage", "weights held", "peak", "parked", "moved", "streamed a run", "known from")]
    rows += [
        (
            s.network,
            size(s.held_bytes),
            size(s.peak_bytes),
            size(s.parked_bytes),
            size(s.moved_bytes),
            size(s.streamed_bytes),
            s.source,
        )
        for s in plan.stages
    ]
    budget = ", no limit set" if planner.budget == NO_LIMIT else f" of {planner.budget}"
    return f"{_columns(rows)}\n{plan}{budget}"


def comparison(planner: Planner, plans: Sequence[Plan]) -> str:
    """Every plan: its peak, whether it fits, and its predicted time over that of the fastest."""
    least = min(plan.cost for plan in plans)
    rows = [("networks", "guidance", "batch", "decoder", "peak", "fits", "predicted time")]
    rows += [
        (
            plan.residency.name, plan.profile.guidance, str(plan.profile.batch), plan.decoding,
            size(plan.peak_bytes), "yes" if planner.fits(plan) else "no", f"{plan.cost / least:.2f}x",
        )
        for plan in sorted(plans, key=lambda plan: plan.cost)
    ]  # fmt: skip
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _settings(model: Model, frames: int, height: int, width: int, asked: Mapping[str, Any]) -> Settings:
    own = {"frames": frames, "height": height, "width": width, **own_values({"model": model}, asked)}
    settings = Settings(**{**own, **asked})
    settings.check_size(model.architecture.size_multiple)
    return settings


def _device(device: str, memory: Memory | None) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise SettingsError(
            "device", expected="auto, cpu or cuda", got=repr(device), remedy="Choose one of these."
        )
    if device == "cuda" and not torch.cuda.is_available() and not isinstance(memory, int):
        budget_is_share = memory == "auto" or str(memory).replace(".", "").isdecimal()
        if budget_is_share:
            raise SettingsError(
                "memory",
                expected='an amount such as "8GiB" where there is no GPU',
                got=repr(memory),
                remedy='Pass memory="8GiB", or the size of the card that is meant.',
            )
    return torch.device(device)
