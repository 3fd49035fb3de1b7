"""Planners of checkpoints and of bundles: what these can do, and who knows the costs of their networks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from svd_engine.backends.registry import BACKENDS
from svd_engine.backends.tensorrt.library import host
from svd_engine.bundle.costs import GraphCosts, PlanCosts
from svd_engine.bundle.flavours import Flavour, Host
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

    plan_costs = PlanCosts(bundle, flavour.name, _host(flavour, device)) if flavour else None
    cost_of: CostOf = plan_costs or GraphCosts(bundle, device.type)

    def lacking(spec: NetworkSpec, residency: type[Residency]) -> BackendUnavailable | None:
        """A plan for this card, or of the denoiser one whose weights stream."""
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
        ceiling=ceiling.of_plans(bundle, plan_costs)
        if plan_costs
        else ceiling.of_graphs(bundle, device.type, reuse is not None),
        reuse=reuse,
        feature=feature,
        lacking=lacking,
    )


def on_devices(
    make: Callable[[torch.device], Planner], first: torch.device, second: torch.device | None
) -> Planner:
    """make: gives a planner of one device, which runs both halves of guidance."""
    return make(first) if second is None else over_two_devices(make(first), make(second))


def over_two_devices(first: Planner, second: Planner) -> Planner:
    """Of an engine that runs a half of guidance on the device of `second`; each plans one that runs both."""
    one_half = replace(first, profiles=_of_single_guidance(first))
    if second.device.type == "cpu":  # as the first is
        return replace(one_half, both_halves=True)
    held = tuple(residency for residency in second.residencies if residency is not Swapped)
    other_half = replace(
        second, profiles=_of_single_guidance(second), residencies=held, slices=(), denoiser_alone=True
    )
    return replace(one_half, second=other_half)


def _of_single_guidance(planner: Planner) -> Callable[[Settings, int], Sequence[Profile]]:
    return lambda settings, videos: [p for p in planner.profiles(settings, videos) if p.guidance == "single"]


def _host(flavour: Flavour, device: torch.device) -> Host | None:
    """What plans are to run on; None where no such GPU is here, or not the library that would run them."""
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        return None
    with suppress(BackendUnavailable):
        return host(flavour, device)
    return None


def _same_video(one: Profile, other: Profile) -> bool:
    return replace(one, guidance=other.guidance, batch=other.batch) == other


def _residencies(swap_networks: bool, streaming: type[Residency] | None) -> tuple[type[Residency], ...]:
    """That were not ruled out, the fastest first.  streaming: whose weights come in every call."""
    if swap_networks:
        return (Swapped,)
    return (Resident, Swapped, streaming) if streaming else (Resident, Swapped)
