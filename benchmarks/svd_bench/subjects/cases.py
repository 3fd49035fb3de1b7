"""Who is measured at what, as data: a case travels to a child process as JSON.  Opens nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from svd_bench.documents.results import Setting
from svd_bench.documents.strict import StrictModel
from svd_bench.subjects.peers import PEERS
from svd_engine.backends import registry
from svd_engine.backends.onnxruntime import load_runtime
from svd_engine.backends.tensorrt.library import require
from svd_engine.checkpoint.opening import (
    Checkpoint,
    check_tells_frames,
    open_checkpoint,
    random_checkpoint,
)
from svd_engine.errors import BackendUnavailable
from svd_engine.spec.network import Placement
from svd_engine.spec.precision import DType
from svd_engine.spec.profile import GuidanceMode, Profile
from svd_engine.spec.weights import Family
from svd_engine.values import one_of

SubjectName = Literal["svd-engine", "diffusers", "diffusers-compile"]
BACKEND_NAMES = tuple(registry.BACKENDS)
BUNDLED = tuple(row.name for row in registry.BACKENDS.values() if row.of_bundle)
FAMILIES: dict[str, Family] = {f"random:{family}": family for family in get_args(Family)}


class Subject(StrictModel):
    """One stack on one device, over one set of weights."""

    name: SubjectName
    backend: str  # of BACKEND_NAMES; of a peer "eager", "torch.compile"
    checkpoint: str  # what `checkpoint_of` takes
    variant: str | None = None  # of its weight files
    device: str
    dtype: DType
    bundle: str | None = None  # for BUNDLED
    graph: str | None = None  # or a folder of `one_graph`, for onnxruntime
    without_rewrites: tuple[str, ...] = ()


class Case(StrictModel):
    """A subject at a stage; `note` goes into its row."""

    subject: Subject
    stage: str
    setting: Setting
    note: str = ""

    def __str__(self) -> str:
        name = f"{self.stage}, {self.subject.name} {self.subject.backend} {self.dtype}"
        return f"{name} ({self.note})" if self.note else name

    @property
    def dtype(self) -> DType:
        """The VAE encoder is float32 whatever the rest is."""
        return "float32" if self.stage == "vae_encoder" else self.subject.dtype


class OpenCase(Protocol):
    """A case, opened.  The first call may compile; `placements` and `rewrites` are settled after it."""

    placements: tuple[Placement, ...]
    rewrites: tuple[str, ...]  # that found a place

    def __call__(self) -> Tensor: ...

    def close(self) -> None: ...


def subjects(
    backends: list[str],
    peers: list[str],
    checkpoint: str,
    device: str,
    dtype: DType,
    bundle: str | None,
    variant: str | None = None,
) -> list[Subject]:
    """Peers first, then ours; `bundle` goes to those that run one.

    Raises SettingsError for a name that is none.
    """
    check_names(backends, peers)
    common = {"checkpoint": checkpoint, "variant": variant, "device": device, "dtype": dtype}
    theirs = [Subject.model_validate({"name": peer, "backend": PEERS[peer], **common}) for peer in peers]
    ours = [
        Subject.model_validate(
            {
                "name": "svd-engine",
                "backend": backend,
                "bundle": bundle if backend in BUNDLED else None,
                **common,
            }
        )
        for backend in backends
    ]
    return theirs + ours


def check_names(backends: list[str], peers: list[str]) -> None:
    """Raises SettingsError for a name that is none."""
    for backend in backends:
        one_of("backend", backend, BACKEND_NAMES)
    for peer in peers:
        one_of("peer", peer, tuple(PEERS))


def check_backends(backends: Collection[str], device: torch.device) -> None:
    """Before anything is opened or exported: raises BackendUnavailable for what cannot run here."""
    if "onnxruntime" in backends:
        load_runtime(device)
    for row in registry.PLAN_BACKENDS:
        if row.flavour is None or row.name not in backends:
            continue
        if device.type != "cuda":
            raise BackendUnavailable(
                f"backend {row.name}",
                expected="a CUDA GPU",
                got=f"device {device}",
                remedy="Leave it out of --backends on the CPU.",
            )
        require(row.flavour)


def checkpoint_of(source: str, variant: str | None = None) -> Checkpoint:
    """Of "random:svd", "random:svd-xt", "random:small", or of anything that `open_checkpoint` takes.

    Raises SettingsError for a file that says nothing of its frames: documents name a checkpoint by its source
    alone, and measure it again by that.
    """
    if source in FAMILIES:
        return random_checkpoint(FAMILIES[source])
    check_tells_frames(source)
    return open_checkpoint(source, variant)


def profile_of(setting: Setting) -> Profile:
    """Without guidance a step is one call of a denoiser of single guidance."""
    guidance: GuidanceMode = "batched" if setting.guidance == "batched" else "single"
    return Profile(
        setting.frames, setting.height, setting.width, setting.batch, guidance, setting.decode_chunk
    )
