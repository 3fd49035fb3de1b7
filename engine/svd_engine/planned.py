"""How a video would be made within a memory budget, in words.  Opens no backend and reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from svd_engine.arguments import dtype_name, torch_dtype
from svd_engine.backends.choose import named
from svd_engine.backends.registry import BACKENDS, check_name, names
from svd_engine.bundle.manifest import MANIFEST
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import unet_levels
from svd_engine.checkpoint.opening import hides_frames, open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.report import size
from svd_engine.request import Settings, own_values
from svd_engine.residency.budget import NO_LIMIT, Budget, Memory, budget_of, check_memory
from svd_engine.residency.devices import one_or_two
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.planning import on_devices, planner_of_bundle, planner_of_checkpoint
from svd_engine.spec.model import Model
from svd_engine.spec.precision import Precision
from svd_engine.spec.reuse import Reuse, feature_of

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
    reuse: Reuse | None = None,
    devices: Sequence[str] | None = None,
) -> tuple[Planner, Settings]:
    """A planner of a bundle's folder or of a checkpoint that counts every call, and the call asked for.

    memory: None sets no limit.
    device: "cpu", "cuda", "cuda:N" or "auto", or two `devices`; of memory in bytes none need be here.
    Raises SettingsError, BundleError, CheckpointError; ProfileError for what a bundle was not exported for.
    """
    check_name(backend)
    check_memory(memory)
    first, second = one_or_two(device, devices, named, swap_networks=swap_networks, reuse=reuse)
    where = named(first)
    is_bundle = (Path(source) / MANIFEST).is_file()
    chosen = USUAL[is_bundle, where.type] if backend == "auto" else backend
    if BACKENDS[chosen].of_bundle != is_bundle or where.type not in BACKENDS[chosen].devices:
        raise SettingsError(
            f"backend {chosen} on {where.type}",
            expected=f"one of {names(is_bundle)}, for what this is, on its device",
            got=chosen,
            remedy="Choose another backend or device.",
        )
    budgets = {one: _budget(memory, one) for one in (where, second) if one}
    if is_bundle:
        bundle = Bundle(source)
        own = bundle.manifest.profiles[0]
        settings = _settings(bundle.manifest.model, own.frames, own.height, own.width, asked)
        feature = bundle.feature(reuse) if reuse else None

        def of_one(device: torch.device) -> Planner:
            return planner_of_bundle(
                bundle, budgets[device], chosen, device, swap_networks, reuse, feature,
                single=second is not None,
            )  # fmt: skip
    else:
        checkpoint = open_checkpoint(source, frames=asked.get("frames") if hides_frames(source) else None)
        model = checkpoint.model
        settings = _settings(model, model.frames, model.height, model.width, asked)
        precision = Precision.of(dtype_name(torch_dtype(dtype, where)))
        feature = feature_of(*unet_levels(checkpoint.configs), reuse.branch or 0) if reuse else None
        alone = planner_of_checkpoint(
            checkpoint, NO_LIMIT, chosen, where, precision, (), swap_networks, reuse, feature
        )

        def of_one(device: torch.device) -> Planner:
            return replace(alone, device=device, budget=budgets[device])

    return replace(on_devices(of_one, where, second), ceiling=None), settings


def table(planner: Planner, plan: Plan) -> str:
    """A plan: a line for each stage, then one for each device that has a budget of its own."""
    placed = [(planner.device, plan)]
    if planner.second and plan.other_half:
        placed.append((planner.second.device, plan.other_half))
    rows = [("stage", "device", "weights held", "peak", "parked", "moved", "streamed a run", "known from")]
    rows += [
        (
            s.network, str(device), size(s.held_bytes), size(s.peak_bytes), size(s.parked_bytes),
            size(s.moved_bytes), size(s.streamed_bytes), s.source,
        )
        for device, part in placed
        for s in part.stages
    ]  # fmt: skip
    return "\n".join([_columns(rows), *planner.in_words(plan)])


def comparison(planner: Planner, plans: Sequence[Plan]) -> str:
    """Every plan: its peak on each device, whether it fits, and its predicted time over the fastest one's."""
    least = min(plan.cost for plan in plans)
    there = [f"peak on {planner.second.device}"] if planner.second else []
    rows = [("networks", "guidance", "batch", "decoder", "peak", *there, "fits", "predicted time")]
    rows += [
        (
            plan.residency.name, plan.profile.guidance, str(plan.profile.batch), plan.decoding,
            size(plan.peak_bytes), *([size(plan.other_half.peak_bytes)] if plan.other_half else []),
            "yes" if planner.fits(plan) else "no", f"{plan.cost / least:.2f}x",
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


def _budget(memory: Memory | None, device: torch.device) -> Budget:
    """Raises SettingsError for a share of a GPU that is not here, or of what is free there."""
    if memory is None:
        return NO_LIMIT
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_share = memory == "auto" or isinstance(memory, float) or str(memory).replace(".", "").isdecimal()
    if device.type == "cuda" and (device.index or 0) >= here and is_share and not isinstance(memory, int):
        raise SettingsError(
            "memory",
            expected='an amount such as "8GiB" where there is no GPU',
            got=repr(memory),
            remedy='Pass memory="8GiB", or the size of the card that is meant.',
        )
    return budget_of(memory, device)
