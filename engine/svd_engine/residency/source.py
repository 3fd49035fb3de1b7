"""What an engine runs over: the networks of a bundle or of a checkpoint, and what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path

import torch

from svd_engine.arguments import dtype_name, torch_dtype
from svd_engine.backends.choose import (
    Choice,
    DeviceName,
    choose_for_bundle,
    choose_for_checkpoint,
    resolve,
)
from svd_engine.backends.registry import BACKENDS
from svd_engine.backends.tensorrt.jit_cache import check_folder, default_folder
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import unet_levels
from svd_engine.checkpoint.opening import Checkpoint, open_checkpoint
from svd_engine.errors import SettingsError
from svd_engine.request import Settings
from svd_engine.residency.budget import Budget, Memory, budget_of, check_memory
from svd_engine.residency.contract import Residency
from svd_engine.residency.devices import one_or_two
from svd_engine.residency.holding import Holding
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.planning import on_devices, planner_of_bundle, planner_of_checkpoint
from svd_engine.residency.resident import Resident
from svd_engine.residency.swapped import Swapped
from svd_engine.spec.model import Model
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, Reuse, feature_of
from svd_engine.spec.weights import Component, LoraFile, WeightFile

UNTIL_A_CALL = Budget(0, 0)  # of "auto": what is free is asked when networks are to be loaded


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    name: str  # as the user gave it
    model: Model
    precision: Precision  # of its networks
    residency: Residency
    choice: Choice
    default: Profile  # of a call that says nothing of size and frames
    profile_for: Callable[[Settings, int], Profile]  # of a call, and how many videos it makes
    rewrites: Callable[[], dict[str, int]]  # places by "component/rewrite", of what is loaded so far
    weights: Callable[[], list[WeightFile]]  # the checkpoint's files behind what is loaded so far
    lora: tuple[LoraFile, ...] = ()  # fused into the UNet
    without_rewrites: Collection[str] = ()
    reuse: Reuse | None = None  # between evaluations of the denoiser
    feature: Feature | None = None  # that is reused
    planner: Planner | None = None  # None: no memory budget
    budget_of_now: Callable[[torch.device], Budget] | None = None  # of "auto"; None for a named amount
    other_half: Residency | None = None  # of two devices, for the second half of guidance
    slice_frames: Callable[[Settings], int | None] = attrgetter("slice_frames")  # of a streamed decoder

    def planned_anew(self) -> EngineSource:
        """Before networks are loaded.  While they are, the budget stays, and so does the plan of a call."""
        if self.planner is None:
            return self
        return replace(self, planner=self.planner.anew(self.budget_of_now))

    def plan(self, settings: Settings, videos: int) -> Plan:
        """How a call runs.  Raises SettingsError for one that the memory budget has no place for."""
        if self.planner is not None:
            return self.planner.choose(settings, videos)
        return Plan(self.profile_for(settings, videos), self.slice_frames(settings), type(self.residency))


def of_bundle(
    folder: str | Path,
    backend: str,
    device: str | torch.device,
    swap_networks: bool,
    jit_cache: str | Path | None,
    memory: Memory | None = None,
    reuse: Reuse | None = None,
    devices: Sequence[DeviceName] | None = None,
) -> EngineSource:
    """Raises BundleError, BackendUnavailable, OutputError, SettingsError."""
    check_memory(memory)
    device, second = one_or_two(device, devices, resolve, swap_networks=swap_networks, reuse=reuse)
    _check_place("bundle", folder, "the path of a folder that svd-export wrote")
    _check_jit_cache(jit_cache, backend)
    residency = _residency(swap_networks)
    _check_reuse(reuse)
    bundle = Bundle(folder)
    feature = bundle.feature(reuse) if reuse else None
    choice = choose_for_bundle(backend, device, bundle)
    kept = _jit_folder(jit_cache) if _compiles(choice.backend) else None
    row = BACKENDS[choice.backend]
    made = row.open(bundle, choice.device, kept)
    other_half = None
    if second is not None:
        other_half = Resident(row.open(bundle, choose_for_bundle(row.name, second, bundle).device, kept))
    manifest = bundle.manifest
    reuse = _settled(reuse, feature)
    planner = None
    if memory is not None:
        budget = partial(_budget, memory)
        planner = on_devices(
            lambda where: replace(
                planner_of_bundle(
                    bundle, budget(where), choice.backend, where, swap_networks, reuse, feature,
                    single=second is not None,
                ),
                holding=Holding(where, outside_torch=True),
            ),
            choice.device, second,
        )  # fmt: skip
    return EngineSource(
        name=str(folder),
        model=manifest.model,
        precision=manifest.precision,
        residency=residency(made),
        choice=choice,
        default=manifest.profiles[0],
        profile_for=lambda settings, _videos: (
            bundle.single_profile_for(settings) if other_half else bundle.profile_for(settings)
        ),
        slice_frames=bundle.slice_frames,
        other_half=other_half,
        rewrites=lambda: {f"{r.network}/{r.name}": r.places for r in manifest.rewrites},
        weights=lambda: list(manifest.source.weights),
        lora=manifest.source.lora,
        without_rewrites=manifest.without_rewrites,
        reuse=reuse,
        feature=feature,
        planner=planner,
        budget_of_now=partial(budget_of, "auto") if memory == "auto" else None,
    )


def of_checkpoint(
    checkpoint: str | Path | Checkpoint,
    backend: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    without_rewrites: Collection[str],
    swap_networks: bool,
    variant: str | None = None,
    frames: int | None = None,
    parts: Mapping[Component, str | Path] | None = None,
    lora: Mapping[str | Path, float] | None = None,
    lora_partial: bool = False,
    reuse: Reuse | None = None,
    memory: Memory | None = None,
    devices: Sequence[DeviceName] | None = None,
) -> EngineSource:
    """Raises CheckpointError, BackendUnavailable, SettingsError; nothing is opened before these are said."""
    from svd_engine.networks.modules import Modules
    from svd_engine.networks.rewrites import check_names, rewrites_for

    check_memory(memory)
    if not isinstance(checkpoint, Checkpoint):
        _check_place(
            "checkpoint",
            checkpoint,
            "a name, the path of a folder or file, or a hub id",
        )
    if isinstance(without_rewrites, str) or not isinstance(without_rewrites, Collection):
        raise SettingsError(
            "without_rewrites",
            expected="a list of names of rewrites",
            got=repr(without_rewrites),
            remedy='Pass a list, such as ["fused-qkv"].',
        )
    residency = _residency(swap_networks)
    _check_reuse(reuse)
    device, second = one_or_two(device, devices, resolve, swap_networks=swap_networks, reuse=reuse)
    choice = choose_for_checkpoint(backend, device)
    for name, value in (
        ("variant", variant),
        ("frames", frames),
        ("parts", parts),
        ("lora", lora),
        ("lora_partial", lora_partial or None),
    ):
        if isinstance(checkpoint, Checkpoint) and value is not None:
            raise SettingsError(
                name,
                expected="None with a checkpoint that is open already",
                got=repr(value),
                remedy=f"Open it with open_checkpoint(source, {name}={value!r}).",
            )
    precision = Precision.of(dtype_name(torch_dtype(dtype, choice.device)))
    rewrites = rewrites_for(choice.backend, choice.device.type)
    check_names(without_rewrites, rewrites)
    opened = checkpoint
    if not isinstance(opened, Checkpoint):
        opened = open_checkpoint(opened, variant, frames, parts, lora, lora_partial)
    feature = None
    if reuse is not None:
        feature = feature_of(*unet_levels(opened.configs), reuse.branch or 0)
    modules = Modules(opened, without_rewrites, rewrites)
    row = BACKENDS[choice.backend]
    made = row.open(modules, choice.device, None)
    other_half = None
    if second is not None:
        there = choose_for_checkpoint(row.name, second).device
        other_half = Resident(row.open(Modules(opened, without_rewrites, rewrites), there, None))
    model = opened.model
    reuse = _settled(reuse, feature)
    planner = None
    if memory is not None:
        budget = partial(_budget, memory)
        alone = planner_of_checkpoint(
            opened, budget(choice.device), choice.backend, choice.device, precision, without_rewrites,
            swap_networks, reuse, feature,
        )  # fmt: skip
        planner = on_devices(
            lambda where: replace(
                alone, device=where, budget=budget(where), holding=Holding(where, outside_torch=False)
            ),
            choice.device,
            second,
        )
    return EngineSource(
        name=opened.source,
        model=model,
        precision=precision,
        residency=residency(made),
        choice=choice,
        default=Profile(model.frames, model.height, model.width, decode_chunk=model.frames),
        profile_for=_single_of_request if other_half else Profile.of_request,
        other_half=other_half,
        rewrites=modules.places,
        weights=lambda: list(chain(*modules.weight_files.values())),
        lora=opened.lora,
        without_rewrites=without_rewrites,
        reuse=reuse,
        feature=feature,
        planner=planner,
        budget_of_now=partial(budget_of, "auto") if memory == "auto" else None,
    )


def _budget(memory: Memory, device: torch.device) -> Budget:
    return UNTIL_A_CALL if memory == "auto" else budget_of(memory, device)


def _single_of_request(settings: Settings, videos: int) -> Profile:
    return replace(Profile.of_request(settings, videos), guidance="single")


def _residency(swap_networks: object) -> type[Residency]:
    """Raises SettingsError for what is not a bool: a word such as "no" would count as true."""
    if not isinstance(swap_networks, bool):
        raise SettingsError(
            "swap_networks", expected="True or False", got=repr(swap_networks), remedy="Pass one of these."
        )
    return Swapped if swap_networks else Resident


def _check_reuse(reuse: object) -> None:
    """Raises SettingsError for what is no `Reuse`."""
    if reuse is not None and not isinstance(reuse, Reuse):
        raise SettingsError(
            "reuse",
            expected="None, or an svd_engine.Reuse",
            got=repr(reuse),
            remedy="Pass svd_engine.Reuse(interval=2).",
        )


def _settled(reuse: Reuse | None, feature: Feature | None) -> Reuse | None:
    """With the branch that it has here."""
    return replace(reuse, branch=feature.branch) if reuse and feature else None


def _compiles(backend: str) -> bool:
    """Whether a backend finishes kernels on the card, and can keep them."""
    row = BACKENDS.get(backend)
    return row is not None and row.flavour is not None and row.flavour.compiles_at_first_launch


def _check_jit_cache(given: object, backend: str) -> None:
    """Raises SettingsError for what names no folder, and for a folder that the backend has no use for."""
    if given is not None and (not isinstance(given, (str, Path)) or given == ""):
        raise SettingsError(
            "jit_cache",
            expected='"auto", the path of a folder, or None to keep no kernels',
            got=repr(given),
            remedy="Pass one of these.",
        )
    if backend in BACKENDS and not _compiles(backend) and given not in (None, "auto"):
        raise SettingsError(
            f"jit_cache with backend {backend}",
            expected="it to be left out",
            got=str(given),
            remedy=f"Leave it out: {backend} compiles no kernels that are kept.",
        )


def _jit_folder(jit_cache: str | Path | None) -> Path | None:
    """Raises OutputError for a named folder that cannot be written."""
    if jit_cache is None:
        return None
    return default_folder() if jit_cache == "auto" else check_folder(Path(jit_cache))


def _check_place(what: str, given: object, expected: str) -> None:
    """Raises SettingsError for what is neither a str nor a Path, such as a pipeline object of diffusers."""
    if not isinstance(given, (str, Path)):
        raise SettingsError(
            what,
            expected=expected,
            got=f"an object of type {type(given).__name__}",
            remedy="A pipeline of diffusers becomes a folder with pipeline.save_pretrained(FOLDER).",
        )
