"""Memory that ran out while a network ran, planned or not: what to say, and what would take less."""

from __future__ import annotations

from math import ceil

import torch

from svd_engine.errors import OutOfMemory
from svd_engine.report import peak_device_bytes, peak_host_bytes, size
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner

NEXT = 0.9  # of the peak of a plan: what the next smaller one may take, of whose weights more stream


def shortage(
    network: str,
    said: str,
    device: torch.device,
    plan: Plan,
    planner: Planner | None,
    settings: Settings,
    videos: int,
) -> OutOfMemory:
    """The error for the network of that key; `said` is the allocator's own word."""
    if planner is not None and not plan.stages:  # memory was ample
        plan = planner.usual(settings, videos)
    planned = next((stage.peak_bytes for stage in plan.stages if stage.network == network), None)
    seen = peak_device_bytes(device) or peak_host_bytes()
    return OutOfMemory(
        f"memory of {device} for {network}",
        expected="room for its activations" if planned is None else f"room for the planned {size(planned)}",
        got=f"{said} (this process has taken {size(seen)} at its highest)",
        remedy=_remedy(plan, planner, settings, videos),
    )


def _remedy(plan: Plan, planner: Planner | None, settings: Settings, videos: int) -> str:
    if planner is None:
        return 'Pass memory="auto": each call then takes the fastest way that fits.'
    if any(residency.streams for residency in planner.residencies):  # which fill a budget
        planner = planner.within(Budget(int(NEXT * plan.peak_bytes)))
    peaks = [p.peak_bytes for p in planner.considered(settings, videos) if p.peak_bytes < plan.peak_bytes]
    if not peaks:
        return "Ask for fewer frames or a smaller video: no plan of this call takes less."
    return f'Pass memory="{ceil(max(peaks) / 2**20)}MiB" for the next smaller plan.'
