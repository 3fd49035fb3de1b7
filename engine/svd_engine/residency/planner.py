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
from functools import cached_property, partial
from itertools import product
from math import ceil, prod

import torch

from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.report import PlannedStage, PlanReport, size
from svd_engine.request import Settings
from svd_engine.residency.budget import NO_LIMIT, Budget, used_by_runtime
from svd_engine.residency.ceiling import Ceiling
from svd_engine.residency.contract import Residency
from svd_engine.residency.holding import HeldBytes, Holding
from svd_engine.residency.plan import Plan
from svd_engine.sampling.registry import SAMPLERS
from svd_engine.spec.cost import CostOf, NetworkCost
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import SHALLOW, Feature, Reuse
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
    reuse: between evaluations of the denoiser, of `feature`.
    second: plans the second of two devices, which has the `denoiser_alone`, for a half of guidance.
    both_halves: the two devices are one memory; both halves run there at once, each over its own weights.
    holding: what this engine keeps in memory, and others of the process beside it; None of no engine.
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
    reuse: Reuse | None = None
    feature: Feature | None = None
    second: Planner | None = None
    both_halves: bool = False
    denoiser_alone: bool = False
    holding: Holding | None = None

    def anew(self, budget_of: Callable[[torch.device], Budget] | None) -> Planner:
        """The same, that asks what the process takes without networks, and for its budgets, anew."""
        budget = self.budget if budget_of is None else budget_of(self.device)
        return replace(self, budget=budget, second=self.second.anew(budget_of) if self.second else None)

    def within(self, budget: Budget) -> Planner:
        """The same for another budget, also while networks are loaded."""
        other = replace(self, budget=budget)
        vars(other)["_before"] = self._before
        return other

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
        if self.budget.there is not None and self._may_fit(smallest):
            return smallest
        if self.second and smallest.other_half and self._has_room(smallest):
            raise self.second._refusal(settings, videos, smallest.other_half)
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
        usual = Plan(*self._usual_way(settings, videos))
        most = self.ceiling(settings, videos) * (2 if self.both_halves else 1)
        specs = self._specs(usual.profile, usual.slice_frames)
        most += max(self._kept_bytes(spec, usual.profile, settings, videos) for spec in specs)
        if most > self.budget.bytes - self._runtime_bytes:
            return None
        if self.second is None:
            return usual
        other_half = self.second._ample(settings, videos)
        return replace(usual, other_half=other_half) if other_half else None

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
        """What keeps a call from being run so, here or on the second of two devices."""
        profile, slice_frames, residency = way
        if self.lacking is not None:
            specs = self._specs(profile, slice_frames)
            if here := next(filter(None, (self.lacking(spec, residency) for spec in specs)), None):
                return here
        return self.second._lacking_half(profile) if self.second else None

    def _lacking_half(self, profile: Profile) -> BackendUnavailable | None:
        """What keeps the second device from its half in whatever way."""
        reasons = [self._lacking((profile, None, residency)) for residency in self.residencies]
        return None if None in reasons else reasons[0]

    def report(self, plan: Plan) -> PlanReport:
        other_half = self.second.report(plan.other_half) if self.second and plan.other_half else None
        return plan.report(self.budget.bytes, other_half)

    def in_words(self, plan: Plan) -> list[str]:
        """A plan within its budget; then what the second of two devices does, within its own."""
        lines = [f"{plan}{_limited(self.budget)}"]
        if self.second and (half := plan.other_half):
            lines.append(
                f"the other half of guidance on {self.second.device}: networks {half.residency.name}, "
                f"at most {size(half.peak_bytes)}{_limited(self.second.budget)}"
            )
        return lines

    def fits(self, plan: Plan) -> bool:
        if self.second and plan.other_half and not self.second.fits(plan.other_half):
            return False
        return plan.peak_bytes <= self.budget.bytes

    def _may_fit(self, plan: Plan) -> bool:
        """Whether it does not surely need more than there is."""
        if self.second and plan.other_half and not self.second._may_fit(plan.other_half):
            return False
        return self.budget.there is None or plan.sure_bytes <= self.budget.there

    def _has_room(self, plan: Plan) -> bool:
        """Whether this device does, of two."""
        there = self.budget.there
        return plan.peak_bytes <= self.budget.bytes if there is None else plan.sure_bytes <= there

    def keep(self, plan: Plan) -> None:
        """Before networks are loaded: other engines of this process plan beside what they take."""
        if self.holding is not None:
            self.holding.keep(plan, partial(replace(self, holding=None)._held_after, plan))
        if self.second and plan.other_half:
            self.second.keep(plan.other_half)

    def release(self) -> None:
        """After networks were closed."""
        if self.holding is not None:
            self.holding.release()
        if self.second:
            self.second.release()

    def _held_after(self, plan: Plan) -> int:
        """Bytes of weights that stay on the device when a call has ended."""
        if plan.stages:
            return plan.stages[-1].held_bytes
        specs = self._specs(plan.profile, plan.slice_frames)
        costs = self._costs(specs)
        held = plan.residency.held_weights(list(costs.values()), costs[specs[-1].key], room=0)
        other_weights = costs[specs[2].key].weight_bytes if self.both_halves else 0
        return sum(held.values()) + other_weights

    @property
    def _runtime_bytes(self) -> int:
        """What the process takes beside this engine's networks.

        As measured before they were loaded, so that a later call is planned as the first one was; and what
        other engines have loaded and closed since.
        """
        measured, then = self._before
        now = self.holding.beside() if self.holding else then
        loaded, closed = (sum(count() for count in some) for some in (now - then, then - now))
        return max(0, measured + loaded - closed)

    @cached_property
    def _before(self) -> tuple[int, frozenset[HeldBytes]]:
        """What the process took before networks were loaded, and what of it other engines held."""
        return used_by_runtime(self.device), self.holding.beside() if self.holding else frozenset()

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
        specs = self._specs(profile, slice_frames)
        costs = self._costs(specs)
        runtime = self._runtime_bytes  # after the costs, whose counting imports what networks need
        kind, stages, cost, sure = self.device.type, [], 0.0, 0
        for spec in specs:
            of, calls = costs[spec.key], self._calls(spec, profile, settings, videos)
            at_once = 2 if self.both_halves and spec.network == "denoiser" else 1
            activations = of.activation_bytes * at_once
            other_weights = costs[specs[2].key].weight_bytes if self.both_halves else 0
            beside = runtime + other_weights + activations + _beside(spec, profile, videos)
            beside += self._kept_bytes(spec, profile, settings, videos)
            scratch = ceil(SCRATCH[kind] * activations)
            room = self.budget.bytes - beside - scratch
            held = sum(residency.held_weights(list(costs.values()), of, room).values())
            streamed = residency.streamed_bytes(of, held)
            carried = residency.moved_bytes(of, there_and_back=kind == "cuda")
            if spec.network == SHALLOW:
                carried = 0  # its weights come with the full one's
            carried += streamed * calls
            least = beside + held
            held += other_weights
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
        other_half = self.second._half(settings, videos, profile) if self.second else None
        cost = max(cost, other_half.cost) if other_half else cost
        return Plan(profile, slice_frames, residency, tuple(stages), cost, sure, other_half)

    def _half(self, settings: Settings, videos: int, profile: Profile) -> Plan:
        """Of the second device: the fastest plan that fits there, or else the smallest."""
        ways = ((profile, None, residency) for residency in self.residencies)
        plans = [self._plan(settings, videos, *way) for way in ways if self._lacking(way) is None]
        return next((plan for plan in plans if self.fits(plan)), plans[-1])

    def _specs(self, profile: Profile, slice_frames: int | None) -> list[NetworkSpec]:
        specs = specs_of(profile, self.architecture, self.precision, slice_frames, self.feature)
        return [specs[2]] if self.denoiser_alone else specs

    def _costs(self, specs: Sequence[NetworkSpec]) -> dict[str, NetworkCost]:
        """By key.  Denoisers that take turns stay beside each other: each holds the weights of both."""
        costs = {spec.key: self.cost_of(spec) for spec in specs}
        turns = [spec.key for spec in specs if spec.kept]
        together = {part: count for key in turns for part, count in costs[key].weights.items()}
        return costs | {key: replace(costs[key], weights=together) for key in turns}

    def _kept_bytes(self, spec: NetworkSpec, profile: Profile, settings: Settings, videos: int) -> int:
        """Of the features that are reused, of all videos and of both halves of guidance."""
        if not spec.kept:
            return 0
        feature = (spec.inputs if spec.network == SHALLOW else spec.outputs)[-1]
        runs = 2 if profile.guidance == "single" and settings.guided else 1
        copies = 2 if profile.batch < videos else 1  # they are put together of several runs'
        return feature.nbytes // profile.batch * videos * runs * copies

    def _calls(self, spec: NetworkSpec, profile: Profile, settings: Settings, videos: int) -> int:
        """How often a call of the engine calls a network."""
        if spec.network == "vae_decoder":
            chunk = spec.inputs[0].shape[0]
            return videos * sum(size == chunk for size in profile.chunks)
        if spec.network not in ("denoiser", SHALLOW):
            return ceil(videos / settings.videos_per_image / profile.batch)
        halves = 2 if profile.guidance == "single" and settings.guided and not self._shared_out else 1
        evaluations = settings.steps * SAMPLERS[settings.sampler].evaluations
        if self.reuse is not None:
            full = ceil(evaluations / self.reuse.interval)
            evaluations = full if spec.network == "denoiser" else evaluations - full
        return ceil(videos / profile.batch) * halves * evaluations

    @property
    def _shared_out(self) -> bool:
        """Whether each of two devices runs one half of guidance."""
        return self.second is not None or self.both_halves or self.denoiser_alone

    def _refusal(self, settings: Settings, videos: int, smallest: Plan) -> SettingsError:
        s, there = settings, self.budget.there
        needed = smallest.peak_bytes if there is None else smallest.sure_bytes
        fitting: list[str] = []
        if self._weights_fit(s, videos):
            fitting = [_less(s, other) for other in self.lesser(s) if self._fits_at_all(other, videos)]
        return SettingsError(
            f"memory of {self.device}" if self.denoiser_alone else "memory",
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

    def _least(self, settings: Settings, videos: int) -> Plan | None:
        """The plan of least memory: the last of each list."""
        ways = [way for way in self._choices(settings, videos) if self._lacking(way) is None]
        return self._plan(settings, videos, *ways[-1]) if ways else None

    def _fits_at_all(self, settings: Settings, videos: int) -> bool:
        least = self._least(settings, videos)
        return least is not None and self.fits(least)

    def _weights_fit(self, settings: Settings, videos: int) -> bool:
        """Whether they do with nothing beside them: else no lesser call fits, and none need be counted."""
        least = self._least(settings, videos)
        held = max(stage.held_bytes for stage in least.stages) if least else 0
        return self._runtime_bytes + held <= self.budget.bytes


def _beside(spec: NetworkSpec, profile: Profile, videos: int) -> int:
    """Bytes of the pipeline's own tensors while a network runs, float32."""
    if spec.network == "vae_decoder":
        return 4 * videos * profile.frames * 3 * profile.height * profile.width
    if spec.network not in ("denoiser", SHALLOW):
        return 0
    return LATENT_VIDEOS * 4 * videos * prod(spec.inputs[0].shape[1:])


def _limited(budget: Budget) -> str:
    return ", no limit set" if budget == NO_LIMIT else f" of {budget}"


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
