"""Planners of checkpoints and of bundles: what these can do, and who knows the costs of their networks."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch

from svd_engine.backends.registry import BACKENDS
from svd_engine.bundle.costs import GraphCosts, PlanCosts
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import BackendUnavailable
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.request import Settings
from svd_engine.residency import ceiling
from svd_engine.residency.budget import Budget
from svd_engine.residency.contract import Residency
from svd_engine.residency.offloaded import Offloaded
from svd_engine.residency.planner import SLICES, Planner, checkpoint_profiles, lesser_calls
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.residency.weight_streaming import WeightStreaming
from svd_engine.spec.cost import CostOf
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, Reuse
from svd_engine.spec.tensors import NetworkSpec


def planner_of_checkpoint(
    checkpoint: Checkpoint,
    budget: Budget,
    backend: str,
    device: torch.device,
    precision: Precision,
    without_rewrites: Collection[str] = (),
    swap_networks: bool = False,
    reuse: Reuse | None = None,
    feature: Feature | None = None,
) -> Planner:
    from svd_engine.networks.counting import TorchCosts

    architecture = checkpoint.model.architecture
    rewrites = rewrites_for(backend, device.type)
    return Planner(
        budget,
        device,
        architecture,
        precision,
        TorchCosts(checkpoint, device.type, without_rewrites, rewrites),
        checkpoint_profiles,
        _residencies(swap_networks, None if device.type == "cpu" else Offloaded),
        slices=SLICES,
        lesser=lambda settings: lesser_calls(settings, architecture.size_multiple),
        ceiling=ceiling.of_checkpoint(checkpoint, precision),
        reuse=reuse,
        feature=feature,
    )


def planner_of_bundle(
    bundle: Bundle,
    budget: Budget,
    backend: str,
    device: torch.device,
    swap_networks: bool = False,
    reuse: Reuse | None = None,
    feature: Feature | None = None,
    single: bool = False,
) -> Planner:
    """single: over profiles of single guidance alone, for two devices."""
    flavour = BACKENDS[backend].flavour
    manifest = bundle.manifest

    def usable(profile: Profile) -> bool:
        return profile.guidance == "single" or not single

    def profiles(settings: Settings, _videos: int) -> Sequence[Profile]:
        """Those that make the same video as the one that the bundle would take: that first."""
        taken = bundle.single_profile_for(settings) if single else bundle.profile_for(settings)
        same = [p for p in bundle.profiles(settings) if _same_video(p, taken) and usable(p)]
        return sorted(same, key=lambda p: (p != taken, p.guidance != taken.guidance, -p.batch))

    def lesser(settings: Settings) -> Iterator[Settings]:
        decoding = settings.decoding
        if manifest.streaming is not None and decoding != "streamed":
            yield replace(settings, decoding="streamed", decode_chunk_size=None)
        if settings.guidance_scales is None:
            for p in filter(usable, manifest.profiles):
                of_size = replace(settings, frames=p.frames, height=p.height, width=p.width)
                if decoding == "auto":
                    yield replace(of_size, decode_chunk_size=p.decode_chunk)
                elif decoding == "streamed" or p.decode_chunk == p.frames:
                    yield of_size

    plan_costs = PlanCosts(bundle, flavour.name) if flavour else None
    cost_of: CostOf = plan_costs or GraphCosts(bundle, device.type)

    def lacking(spec: NetworkSpec, residency: type[Residency]) -> BackendUnavailable | None:
        """A plan that was not built, or of the denoiser one whose weights stream."""
        streaming = residency.streams and spec.network == "denoiser"
        return plan_costs.missing(spec, streaming) if plan_costs else None

    return Planner(
        budget,
        device,
        manifest.model.architecture,
        manifest.precision,
        cost_of,
        profiles,
        _residencies(swap_networks, WeightStreaming if flavour and reuse is None else None),
        slices=() if manifest.streaming is None else (manifest.streaming.slice_frames,),
        lesser=lesser,
        ceiling=ceiling.of_plans(bundle, cost_of, flavour.name)
        if flavour
        else ceiling.of_graphs(bundle, device.type, reuse is not None),
        reuse=reuse,
        feature=feature,
        lacking=lacking,
    )


def over_two_devices(first: Planner, device: torch.device, budget: Budget) -> Planner:
    """Of an engine that runs a half of guidance on `device`.  first: plans one that runs both."""

    def profiles(settings: Settings, videos: int) -> Sequence[Profile]:
        return [p for p in first.profiles(settings, videos) if p.guidance == "single"]

    halved = replace(first, profiles=profiles)
    if device.type == "cpu":  # as the first is
        return replace(halved, both_halves=True)
    held = tuple(residency for residency in first.residencies if residency is not Swapped)
    second = replace(halved, device=device, budget=budget, residencies=held, slices=(), denoiser_alone=True)
    return replace(halved, second=second)


def _same_video(one: Profile, other: Profile) -> bool:
    return replace(one, guidance=other.guidance, batch=other.batch) == other


def _residencies(swap_networks: bool, streaming: type[Residency] | None) -> tuple[type[Residency], ...]:
    """That were not ruled out, the fastest first.  streaming: whose weights come in every call."""
    if swap_networks:
        return (Swapped,)
    return (Resident, Swapped, streaming) if streaming else (Resident, Swapped)
