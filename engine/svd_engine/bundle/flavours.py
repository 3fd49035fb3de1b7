"""TensorRT's two flavours, what a plan is for (`Target`), and what is here (`Host`).

Plain data: imports no torch and no TensorRT, so that a plan can be judged, or asked for, where neither runs.

    flavour        builds                                      runs on
    tensorrt       on the GPU that runs it, or on one alike    any card from Turing on, H100 and B200 included
    tensorrt-rtx   anywhere, with or without a GPU             RTX cards: Turing (sm75) to Blackwell (sm120)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from svd_engine.errors import SettingsError
from svd_engine.install import install_line
from svd_engine.spec import bounds

FlavourName = Literal["tensorrt", "tensorrt-rtx"]
Capability = tuple[bounds.CapabilityNumber, bounds.CapabilityNumber]  # compute capability of a GPU: (8, 9)
TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)


def sm(capability: Capability) -> str:
    """sm89, for (8, 9)."""
    return f"sm{capability[0]}{capability[1]}"


@dataclass(frozen=True)
class Flavour:
    """What differs between the two; the code that builds and runs plans is one."""

    name: FlavourName  # also of the backend, and of the extra that installs it
    title: str  # in messages
    module: str  # of Python
    prefix: str  # of its version in the names of plans
    oldest: tuple[int, int]  # version that has all that is used here
    too_new: tuple[int, int]  # first version that is unknown here
    targets: tuple[Capability, ...]  # that it compiles for by name; none: only for the GPU at hand
    portable: tuple[Capability, ...]  # what a plan without named targets runs on
    preferred: tuple[Capability, ...]  # cards for which it is the one to choose
    builds_without_gpu: bool
    compiles_at_first_launch: bool  # kernels are finished by a JIT compiler, on the card that runs them
    cannot: Mapping[str, str] = field(default_factory=dict, hash=False)  # option -> why

    @property
    def install(self) -> str:
        return install_line(self.name)

    @property
    def versions(self) -> str:
        """The versions that are known to work, in words."""
        before = f"{self.too_new[0]}" if self.too_new[1] == 0 else ".".join(map(str, self.too_new))
        return f"{self.oldest[0]}.{self.oldest[1]} or newer and below {before}"


TENSORRT = Flavour(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    prefix="trt",
    oldest=(10, 14),  # the oldest whose bindings build and load these plans
    too_new=(12, 0),
    targets=(),
    portable=(),
    preferred=(),
    builds_without_gpu=False,
    compiles_at_first_launch=False,
)
_LATER_WEIGHTS = "its compiler asks a GPU for plans whose weights are given later; keep them in the plan"
TENSORRT_RTX = Flavour(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    prefix="trtrtx",
    oldest=(1, 7),  # compute capabilities by name, and the runtime cache's checks
    too_new=(2, 0),
    targets=(TURING, AMPERE, (8, 6), (8, 9), (12, 0), (12, 1)),
    portable=((8, 6), (8, 9), (12, 0)),
    preferred=((8, 6), (8, 9), (12, 0), (12, 1)),
    builds_without_gpu=True,
    compiles_at_first_launch=True,
    cannot={
        "stripped": _LATER_WEIGHTS,
        "refittable": _LATER_WEIGHTS,
        "hardware_compatibility": "its plans name the cards that they are for; use the target",
        "workspace_bytes": "it times no kernels on a GPU, and takes no limit of scratch memory",
        "optimization_level": "it times no kernels, and its plans are the same at every level",
        "timing_cache": "it times no kernels; its JIT cache belongs to the card that runs the plan",
    },
)
FLAVOURS: dict[str, Flavour] = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


@dataclass(frozen=True)
class Host:
    """What is here: one flavour's library, and one GPU."""

    flavour: FlavourName
    version: str  # of the library, all of it
    gpu: str  # name, as the driver gives it
    compute_capability: Capability

    def __str__(self) -> str:
        return f"{FLAVOURS[self.flavour].title} {self.version} on {self.gpu}, {sm(self.compute_capability)}"


@dataclass(frozen=True)
class Target:
    """What a plan is for: cards of one name, or of the listed compute capabilities, or of one and newer."""

    label: str  # in the plan's name and in messages: "sm86-sm89", "portable", "nvidia-h100-80gb"
    capabilities: Annotated[tuple[Capability, ...], Field(min_length=1)]
    gpu: str = ""  # the only name of a card that it runs on; "" any
    or_newer: bool = False

    def misfit(self, host: Host) -> str:
        """What keeps a plan for it from running on the GPU of `host`; empty when nothing does."""
        here = host.compute_capability
        if self.gpu and self.gpu != host.gpu:
            return f"built for {self.gpu}, here is {host.gpu}"
        if here in self.capabilities or (self.or_newer and here >= min(self.capabilities)):
            return ""
        return f"built for {self.cards}, here is {sm(here)}"

    @property
    def cards(self) -> str:
        """The cards that it runs on, in words."""
        names = ", ".join(map(sm, self.capabilities))
        return f"{names} or newer" if self.or_newer else names

    @property
    def breadth(self) -> tuple[bool, bool, int]:
        """Sorts targets: made for one card first, made for many last."""
        return (not self.gpu, self.or_newer, len(self.capabilities))


def card_target(host: Host) -> Target:
    """Cards of the very name of the one here, which is what TensorRT builds for by default."""
    return Target(slug(host.gpu), (host.compute_capability,), gpu=host.gpu)


def capability_target(capabilities: tuple[Capability, ...]) -> Target:
    """Every card of these compute capabilities."""
    return Target("-".join(map(sm, capabilities)), capabilities)


AMPERE_AND_NEWER = Target("ampere-plus", (AMPERE,), or_newer=True)


def named_target(flavour: Flavour, text: str) -> Target:
    """The target of "portable" or "sm86,sm89,sm120", in ascending order whatever the order of `text`.

    Raises SettingsError for a name that the flavour cannot compile for.
    """
    text = text.lower()
    if text.strip() == "portable" and flavour.portable:
        return Target("portable", flavour.portable)
    known = {sm(capability): capability for capability in flavour.targets}
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        named = f", portable, or one or more of {', '.join(known)}" if known else ""
        raise SettingsError(
            f"target of {flavour.title}",
            expected=f"here{named}",
            got=repr(", ".join(unknown)),
            remedy=_other_target(flavour, unknown),
        )
    return capability_target(tuple(sorted({known[name] for name in names})))


def _other_target(flavour: Flavour, unknown: list[str]) -> str:
    if not flavour.targets:
        rtx = FLAVOURS["tensorrt-rtx"]
        return (
            f"{flavour.title} builds on the GPU that runs the plan: run the command there. "
            f'{rtx.title} (flavour="{rtx.name}") compiles for other cards.'
        )
    if "portable" in unknown:
        return f"Name cards, or portable alone, which is {','.join(map(sm, flavour.portable))}."
    if any(name in ("sm90", "sm100", "sm103") for name in unknown):
        return 'H100, H200, B200 and their like run flavour="tensorrt", built on such a card.'
    return "Choose of these."


def slug(text: str) -> str:
    """Letters, digits, dots, underscores and hyphens of a name."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
