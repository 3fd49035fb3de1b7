"""From a memory budget to the fastest way to run a call within it, or to what would fit.

A plan is one choice out of each list: networks `resident`, `swapped`, `offloaded` or `streaming`; guidance
`batched` or `single`; all videos in a batch or one by one; the decoder whole or streamed over slices.  All of
them make the same video.  What changes it, such as decoding in chunks, happens only where a call asks for it.
A way that networks are missing for, such as plans that were never built, is no choice.

Within an automatic budget a call runs as it would without one wherever that fits, which is known without
counting where there is ample memory.  One that fits in no way is tried in the way of least memory, for counts
are estimates, unless it surely needs more than there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import ceil, prod

import torch

from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.report import PlannedStage, size
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget, used_by_runtime
from svd_engine.residency.ceiling import Ceiling
from svd_engine.residency.contract import Residency
from svd_engine.residency.plan import Plan
from svd_engine.sampling.registry import SAMPLERS
from svd_engine.spec.cost import CostOf
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec

SLICES = (8, 4, 2, 1)  # frames at a time of a streamed decoder, the fastest first
# Of the activations: kernels' scratch memory, and freed blocks that an allocator keeps (glibc's many of them)
SCRATCH = {"cuda": 0.1, "cpu": 0.5}
LOADING = 1.2  # of the weights, while rewrites replace them: SVD's UNet in float32 took 1.13
Way = tuple[Profile, int | None, type[Residency]]  # int: frames of a slice
LATENT_VIDEOS = 6  # that the sampler holds at most, float32

# Operations in the time of one byte: read by a kernel, and moved (GPU: over the bus; CPU: from the disk)
READ = {"cuda": 50, "cpu": 25}
MOVED = {"cuda": 4000, "cpu": 500}


@dataclass(frozen=True)
class Planner:
    """Plans calls of one engine.

    profiles: for a call and a number of videos, those that make its video, the fastest first.
    residencies: that the backend can do, the fastest first.
    slices: frames at a time by which decoders can be streamed, the fastest first; none where they cannot.
    lesser: calls that take less memory, to name where nothing fits.
    ceiling: more than a call can take; None where each has to be counted.
    lacking: what keeps a network from being run so; None where all can.
    """

    budget: Budget
    device: torch.device
    architecture: Architecture
    precision: Precision
    cost_of: CostOf
    profiles: Callable[[Settings, int], Sequence[Profile]]
    residencies: Sequence[type[Residency]]
    slices: Sequence[int]
    lesser: Callable[[Settings], Iterator[Settings]]
    ceiling: Ceiling | None = None
    lacking: Callable[[NetworkSpec, type[Residency]], BackendUnavailable | None] | None = None

    def choose(self, settings: Settings, videos: int) -> Plan:
        """The fastest plan within the budget.

        Raises SettingsError that names what would fit, BackendUnavailable where networks are missing for all.
        """
        if self.budget.there is not None:
            usual = self._ample(settings, videos) or self.usual(settings, videos)
            if self.fits(usual):
                return usual
        plans = self.considered(settings, videos)
        fitting = [plan for plan in plans if self.fits(plan)]
        if fitting:
            return min(fitting, key=lambda plan: plan.cost)
        smallest = min(plans, key=lambda plan: plan.peak_bytes)
        if self.budget.there is not None and smallest.sure_bytes <= self.budget.there:
            return smallest
        raise self._refusal(settings, videos, smallest)

    def unplanned(self, settings: Settings, videos: int) -> Plan:
        """How a call runs without a budget.  Raises BackendUnavailable where a network is missing for it."""
        way = self._default_ways(settings, videos)[0]
        if lacking := self._lacking(way):
            raise lacking
        return self._plan(settings, videos, *way)

    def usual(self, settings: Settings, videos: int) -> Plan:
        """How a call runs where memory sets no limit."""
        return self._plan(settings, videos, *self._usual_way(settings, videos))

    def _ample(self, settings: Settings, videos: int) -> Plan | None:
        """The usual plan, not counted, where it surely fits."""
        if self.ceiling is None:
            return None
        most = self._runtime_bytes + self.ceiling(settings, videos)
        return Plan(*self._usual_way(settings, videos)) if most <= self.budget.bytes else None

    def _usual_way(self, settings: Settings, videos: int) -> Way:
        usual = self._default_ways(settings, videos)
        able = next((way for way in usual if self._lacking(way) is None), None)
        return able or self._ways(settings, videos)[0]

    def _default_ways(self, settings: Settings, videos: int) -> list[Way]:
        """Those that need no budget, the fastest first."""
        slice_frames = self._slices(settings)[-1] if settings.decoding == "streamed" else None
        return [(p, slice_frames, self.residencies[0]) for p in self.profiles(settings, videos)]

    def considered(self, settings: Settings, videos: int) -> list[Plan]:
        """Every plan of a call, whether it fits or not.  Raises BackendUnavailable where there is none.

        One whose weights could stream, and all of them stay, is the same as `swapped`.
        """
        plans = (self._plan(settings, videos, *way) for way in self._ways(settings, videos))
        return [plan for plan in plans if plan.streamed_bytes or not plan.residency.streams]

    def left_out(self, settings: Settings, videos: int) -> list[BackendUnavailable]:
        """Why some plans of a call are not considered, each reason once."""
        reasons = filter(None, map(self._lacking, self._choices(settings, videos)))
        return list({str(reason): reason for reason in reasons}.values())

    def _ways(self, settings: Settings, videos: int) -> list[Way]:
        """The choices that can be run.  Raises BackendUnavailable where there are choices, and none can."""
        ways = self._choices(settings, videos)
        able = [way for way in ways if self._lacking(way) is None]
        if ways and not able:
            raise self.left_out(settings, videos)[0]
        return able

    def _choices(self, settings: Settings, videos: int) -> list[Way]:
        """Out of each list.  A decoder of chunks is not streamed: that would be another video."""
        ways = product(self.profiles(settings, videos), self._slices(settings), self.residencies)
        return [(p, n, residency) for p, n, residency in ways if n is None or p.decode_chunk == p.frames]

    def _lacking(self, way: Way) -> BackendUnavailable | None:
        if self.lacking is None:
            return None
        profile, slice_frames, residency = way
        specs = specs_of(profile, self.architecture, self.precision, slice_frames)
        return next(filter(None, (self.lacking(spec, residency) for spec in specs)), None)

    def fits(self, plan: Plan) -> bool:
        return plan.peak_bytes <= self.budget.bytes

    @cached_property
    def _runtime_bytes(self) -> int:
        """Before networks are loaded: a later call is planned as the first one was."""
        return used_by_runtime(self.device)

    def _slices(self, settings: Settings) -> list[int | None]:
        """Frames that a streamed decoder may hold; None is one that is not streamed."""
        if settings.decoding == "streamed":
            asked = settings.decode_chunk_size
            return (
                [min(asked, settings.frames)]
                if asked
                else [n for n in self.slices if n < settings.frames] or [1]
            )
        free = settings.decoding == "auto" and settings.decode_chunk_size is None
        return [None, *(n for n in self.slices if free and n < settings.frames)]

    def _plan(
        self,
        settings: Settings,
        videos: int,
        profile: Profile,
        slice_frames: int | None,
        residency: type[Residency],
    ) -> Plan:
        specs = specs_of(profile, self.architecture, self.precision, slice_frames)
        costs = {spec.key: self.cost_of(spec) for spec in specs}
        runtime = self._runtime_bytes  # after the costs, whose counting imports what networks need
        kind, stages, cost, sure = self.device.type, [], 0.0, 0
        for spec in specs:
            of, calls = costs[spec.key], _calls(spec, profile, settings, videos)
            beside = runtime + of.activation_bytes + _beside(spec, profile, videos)
            scratch = ceil(SCRATCH[kind] * of.activation_bytes)
            room = self.budget.bytes - beside - scratch
            held = sum(residency.held_weights(list(costs.values()), of, room).values())
            streamed = residency.streamed_bytes(of, held)
            carried = residency.moved_bytes(of, there_and_back=kind == "cuda") + streamed * calls
            least = beside + held
            peak = least + scratch
            if of.loading_bytes:
                others = runtime + held - of.weight_bytes
                peak = max(peak, others + ceil(LOADING * of.loading_bytes))
            sure = max(sure, least)
            moved = carried + of.moved_bytes * calls
            stages.append(
                PlannedStage(
                    network=spec.key, held_bytes=held, peak_bytes=peak, parked_bytes=of.parked_bytes,
                    moved_bytes=moved, streamed_bytes=streamed, source=of.source,
                )
            )  # fmt: skip
            passes = ceil(profile.frames / slice_frames) if slice_frames and spec is specs[-1] else 1
            read = of.weight_bytes * passes + of.traffic_bytes
            cost += calls * (of.operations + READ[kind] * read) + MOVED[kind] * moved
        return Plan(profile, slice_frames, residency, tuple(stages), cost, sure)

    def _refusal(self, settings: Settings, videos: int, smallest: Plan) -> SettingsError:
        s, there = settings, self.budget.there
        needed = smallest.peak_bytes if there is None else smallest.sure_bytes
        fitting = [_less(s, other) for other in self.lesser(s) if self._fits_at_all(other, videos)]
        return SettingsError(
            "memory",
            expected=f"{size(needed)} or more for {s.frames} frames of {s.height}x{s.width} "
            f"({smallest}, in {_largest(smallest)})",
            got=str(self.budget) if there is None else f"{size(there)} in all",
            remedy=(
                f'Pass memory="{_rounded_up(smallest.peak_bytes)}"'
                if there is None
                else f"Use a device of {size(smallest.peak_bytes)} or more"
            )
            + "".join(f", or {less}" for less in dict.fromkeys(fitting))
            + ".",
        )

    def _fits_at_all(self, settings: Settings, videos: int) -> bool:
        """Whether the plan of least memory fits: the last of each list."""
        ways = [way for way in self._choices(settings, videos) if self._lacking(way) is None]
        return bool(ways) and self.fits(self._plan(settings, videos, *ways[-1]))


def _calls(spec: NetworkSpec, profile: Profile, settings: Settings, videos: int) -> int:
    """How often a call of the engine calls a network."""
    if spec.network == "vae_decoder":
        chunk = spec.inputs[0].shape[0]
        return videos * sum(size == chunk for size in profile.chunks)
    if spec.network != "denoiser":
        return ceil(videos / settings.videos_per_image / profile.batch)
    halves = 2 if profile.guidance == "single" and settings.guided else 1
    evaluations = settings.steps * SAMPLERS[settings.sampler].evaluations
    return ceil(videos / profile.batch) * halves * evaluations


def _beside(spec: NetworkSpec, profile: Profile, videos: int) -> int:
    """Bytes of the pipeline's own tensors while a network runs, float32."""
    if spec.network == "vae_decoder":
        return 4 * videos * profile.frames * 3 * profile.height * profile.width
    return LATENT_VIDEOS * 4 * videos * prod(spec.inputs[0].shape[1:]) if spec.network == "denoiser" else 0


def _largest(plan: Plan) -> str:
    return max(plan.stages, key=lambda stage: stage.peak_bytes).network


def _rounded_up(count: int) -> str:
    """An amount that `budget_of` reads, of at least so many bytes."""
    return f"{ceil(count / 2**30 * 10) / 10}GiB" if count >= 2**30 else f"{ceil(count / 2**20)}MiB"


def _less(asked: Settings, other: Settings) -> str:
    """What a lesser call has to ask for."""
    named: dict[str, Callable[[Settings], object]] = {
        "num_frames": lambda s: s.frames,
        "height": lambda s: s.height,
        "width": lambda s: s.width,
        "decoding": lambda s: f'"{s.decoding}"',
        "decode_chunk_size": lambda s: s.decode_chunk_size,
    }
    changes = {name: value(other) for name, value in named.items() if value(other) != value(asked)}
    return ", ".join(f"{name}={value}" for name, value in changes.items())


def lesser_calls(settings: Settings, multiple: int) -> Iterator[Settings]:
    """For a checkpoint: an exact decoder that was not asked for, fewer frames, smaller videos."""
    if settings.slice_frames != 1:
        yield replace(settings, decoding="streamed", decode_chunk_size=None)
    quarters = (3, 2, 1)
    if settings.guidance_scales is None:
        yield from (
            replace(settings, frames=frames)
            for frames in dict.fromkeys(settings.frames * n // 4 for n in quarters)
            if frames
        )
    for n in quarters:
        height, width = (side * n // 4 // multiple * multiple for side in (settings.height, settings.width))
        if height and width:
            yield replace(settings, height=height, width=width)


def checkpoint_profiles(settings: Settings, videos: int) -> list[Profile]:
    """All videos in a batch or one by one, both halves of guidance in a call or one."""
    asked = Profile.of_request(settings, videos)
    modes = ("batched", "single") if asked.guidance == "batched" else ("single",)
    return [
        replace(asked, guidance=mode, batch=batch)  # type: ignore[arg-type]  # a GuidanceMode
        for batch in dict.fromkeys((videos, 1))
        for mode in modes
    ]
