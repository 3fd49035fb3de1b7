"""The sampling loop's parts as pure functions.  Knows no images, networks or backends.

schedules.py        noise levels
preconditioning.py  EDM scalings
guiders.py          guidance scales by frame
samplers.py         loops over denoise(x, sigma)
"""

from __future__ import annotations

from dataclasses import dataclass

from svd_engine.sampling.guiders import Guider, linear
from svd_engine.sampling.samplers import Sampler, euler
from svd_engine.sampling.schedules import Schedule, karras


@dataclass(frozen=True)
class Sampling:
    """How a video is sampled.  SVD's own by default; a caller's noise levels replace the schedule's."""

    sampler: Sampler = euler
    schedule: Schedule = karras
    guider: Guider = linear
