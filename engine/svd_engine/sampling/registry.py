"""The one table of samplers, schedules and guiders.  Importing it loads no torch.

The list of a call's parameters, the command's options, the pipeline and docs/samplers.md's table read it;
another sampler is a function and a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svd_engine.sampling import guiders, samplers, schedules
from svd_engine.sampling.guiders import Guider
from svd_engine.sampling.samplers import Sampler
from svd_engine.sampling.schedules import Schedule


@dataclass(frozen=True)
class SamplerEntry:
    sample: Sampler
    help: str
    evaluations: int = 1  # of the denoiser in a step; one in a step to noise level 0
    churns: bool = False  # takes `churn`


@dataclass(frozen=True)
class ScheduleEntry:
    levels: Schedule
    help: str
    curved: bool = False  # takes `rho`


@dataclass(frozen=True)
class GuiderEntry:
    scales: Guider
    help: str
    rises: bool = True  # from `min_guidance_scale`


SAMPLERS: Mapping[str, SamplerEntry] = {
    "euler": SamplerEntry(samplers.euler, "first order, diffusers' and Stability's own", churns=True),
    "heun": SamplerEntry(samplers.heun, "second order, of the EDM paper", evaluations=2, churns=True),
    "euler-ancestral": SamplerEntry(samplers.euler_ancestral, "first order, with fresh noise in every step"),
    "dpmpp-2m": SamplerEntry(samplers.dpmpp_2m, "second order out of two steps (DPM-Solver++)"),
    "dpmpp-2s-ancestral": SamplerEntry(
        samplers.dpmpp_2s_ancestral, "second order, with fresh noise in every step", evaluations=2
    ),
    "lms": SamplerEntry(samplers.lms, "linear multistep, fourth order out of four steps"),
    "lcm": SamplerEntry(samplers.lcm, "for few-step networks such as AnimateLCM-SVD, 1 to 8 steps"),
}

SCHEDULES: Mapping[str, ScheduleEntry] = {
    "karras": ScheduleEntry(schedules.karras, "equal steps in sigma^(1 / rho)", curved=True),
    "exponential": ScheduleEntry(schedules.exponential, "equal steps in log sigma"),
    "ays": ScheduleEntry(schedules.ays, "Align Your Steps, made for SVD in 10 steps"),
    "lcm": ScheduleEntry(schedules.lcm, "the levels of AnimateLCM-SVD, at most 40 steps"),
}

GUIDERS: Mapping[str, GuiderEntry] = {
    "linear": GuiderEntry(guiders.linear, "minimum at the first frame, maximum at the last"),
    "constant": GuiderEntry(guiders.constant, "maximum in every frame", rises=False),
    "triangle": GuiderEntry(guiders.triangle, "minimum at both ends, maximum in the middle"),
    "trapezoid": GuiderEntry(
        guiders.trapezoid, "maximum, but for a rise and a fall over a tenth of the frames each"
    ),
}


def evaluations(sampler: str, levels: Sequence[float]) -> int:
    """How often a sampler evaluates the denoiser on its way along noise levels [steps + 1]."""
    more = SAMPLERS[sampler].evaluations - 1
    return len(levels) - 1 + more * sum(level > 0 for level in levels[1:])
