"""Which flavour of TensorRT builds, and for which cards: what was asked for, or what fits here, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from svd_engine.backends.tensorrt.library import host, installed
from svd_engine.bundle.flavours import (
    AMPERE_AND_NEWER,
    FLAVOURS,
    TENSORRT,
    TENSORRT_RTX,
    Flavour,
    Host,
    Target,
    capability_target,
    card_target,
    named_target,
    sm,
)
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.values import one_of
from svd_export.tensorrt_builder import HardwareCompatibility


@dataclass(frozen=True)
class Chosen:
    flavour: Flavour
    reason: str


def choose_flavour(name: str | None, target: str | None, given: Mapping[str, object] | None = None) -> Chosen:
    """The flavour of that name, or else the one installed; with both, the one for the card here.

    given: options of the build; one that only TensorRT has chooses it.
    Raises SettingsError for a name that is none, BackendUnavailable when neither is installed.
    """
    if name is not None:
        one_of("flavour", name, tuple(FLAVOURS))
        return Chosen(FLAVOURS[name], "asked for")
    found = installed()
    if not found:
        lines = " or ".join(f"{flavour.install} ({flavour.title})" for flavour in FLAVOURS.values())
        raise BackendUnavailable(
            "building TensorRT plans",
            expected="TensorRT, or TensorRT for RTX",
            got="neither",
            remedy=f"Run: {lines}",
        )
    if len(found) == 1:
        return Chosen(found[0], "the one that is installed")
    if target not in (None, "here"):
        return Chosen(TENSORRT_RTX, "both are installed, and it compiles for cards that are not here")
    if impossible := _impossible(TENSORRT_RTX, given or {}):
        return Chosen(TENSORRT, f"both are installed, and only it has the option {next(iter(impossible))}")
    if not torch.cuda.device_count():
        return Chosen(TENSORRT_RTX, "both are installed, and it needs no GPU")
    here = torch.cuda.get_device_capability(torch.cuda.current_device())
    chosen = TENSORRT_RTX if here in TENSORRT_RTX.preferred else TENSORRT
    return Chosen(chosen, f"both are installed, and it is the one for {sm(here)}, the card here")


def choose_target(flavour: Flavour, text: str | None, compatibility: HardwareCompatibility) -> Target:
    """The target of "here", "portable" or "sm86,sm89"; None is the card here, or portable without a GPU.

    compatibility: how much beyond the card here, for a flavour that builds on it.  Raises SettingsError for
    a target that the flavour has not, BackendUnavailable for "here" without a fitting GPU.
    """
    if text is None and flavour.portable and not torch.cuda.device_count():
        text = "portable"
    if text not in (None, "here"):
        return named_target(flavour, text or "")
    if not torch.cuda.device_count():
        raise BackendUnavailable(
            f"target here of {flavour.title}",
            expected="a CUDA GPU of the kind that will run the plans",
            got=f"none that torch {torch.__version__} can use",
            remedy='Name the cards instead: target="sm86,sm89,sm120", or target="portable".'
            if flavour.targets
            else "Copy the bundle to a machine with such a GPU and run the same command there.",
        )
    return _target_here(
        flavour, host(flavour, torch.device("cuda", torch.cuda.current_device())), compatibility
    )


def _target_here(flavour: Flavour, here: Host, compatibility: HardwareCompatibility) -> Target:
    if flavour.targets:
        card = sm(here.compute_capability)
        if here.compute_capability not in flavour.targets:
            raise BackendUnavailable(
                f"target here of {flavour.title}",
                expected=f"a card of {', '.join(map(sm, flavour.targets))}",
                got=f"{here.gpu}, {card}: no {card.upper()} target",
                remedy='Use flavour="tensorrt" on this card, or name others: target="sm86,sm89".',
            )
        return capability_target((here.compute_capability,))
    if compatibility == "ampere+":
        return AMPERE_AND_NEWER
    return card_target(here) if compatibility == "none" else capability_target((here.compute_capability,))


def check_options(flavour: Flavour, given: Mapping[str, object]) -> None:
    """Raises SettingsError for an option that the flavour cannot do, with the reason."""
    for option, value in _impossible(flavour, given).items():
        raise SettingsError(
            f"{option} with {flavour.title}",
            expected="it to be left out",
            got=str(value),
            remedy=f"Leave it out: {flavour.cannot[option]}.",
        )


def _impossible(flavour: Flavour, given: Mapping[str, object]) -> dict[str, object]:
    """The options that were given, and that the flavour cannot do."""
    return {
        option: value
        for option, value in given.items()
        if option in flavour.cannot and not (value is None or value is False or value == "")
    }
