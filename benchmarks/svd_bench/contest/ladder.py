"""The ladder: the exact rewrites added one at a time, every rung timed beside diffusers' own module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from svd_bench.contest.contest import Bench, contest
from svd_bench.contest.stages import reference_output
from svd_bench.documents.results import Setting
from svd_bench.subjects.cases import Case, Subject, checkpoint_of
from svd_bench.subjects.flop import stage_flop
from svd_bench.subjects.one_graph import exported_graph
from svd_bench.subjects.opening import stage_spec
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.model import Architecture
from svd_engine.spec.precision import DType, Precision

Rungs = Literal["all", "ends"]
LADDERS = ("eager", "compiled", "onnxruntime")  # backends that run one network by itself
STAGE_OF = {"unet": "denoiser_step", "vae_decoder": "vae_decoder"}


def measure_ladder(
    bench: Bench,
    peer: Subject,
    dtype: DType,
    setting: Setting,
    networks: Sequence[str],
    backends: Sequence[str],
    rungs: Rungs,
) -> None:
    """Puts diffusers' row and one a rung and backend into the recorder, network after network.

    `peer` is diffusers, eager; ours compute in `dtype`, which may be another.  On the CPU the reference of
    outputs is diffusers' float32, elsewhere the peer itself.
    """
    checkpoint = checkpoint_of(peer.checkpoint, peer.variant)
    architecture = checkpoint.model.architecture
    for network in networks:
        stage = STAGE_OF[network]
        anchor = Case(subject=peer, stage=stage, setting=setting)
        reference = None
        if bench.device.type == "cpu" and peer.dtype != "float32":
            exact = peer.model_copy(update={"dtype": "float32"})
            reference = reference_output(bench, Case(subject=exact, stage=stage, setting=setting))
        flop = stage_flop(stage, setting, architecture, checkpoint.configs)
        contest(
            bench, cases(bench, anchor, dtype, architecture, backends, rungs), reference, flop, skip_same=True
        )


def cases(
    bench: Bench,
    anchor: Case,
    dtype: DType,
    architecture: Architecture,
    backends: Sequence[str],
    rungs: Rungs,
) -> Iterator[Case]:
    """diffusers, then every backend from the bottom up.  A graph lives until the next case is asked for."""
    yield anchor
    spec = stage_spec(anchor.stage, anchor.setting, architecture, Precision.of(dtype))
    for backend in backends:
        for note, without in steps_of(backend, rungs, bench.device):
            subject = anchor.subject.model_copy(
                update={"name": "svd-engine", "backend": backend, "dtype": dtype, "without_rewrites": without}
            )
            case = anchor.model_copy(update={"subject": subject, "note": note})
            if backend != "onnxruntime":
                yield case
                continue
            bench.say(f"{case}: exporting")
            with exported_graph(subject, spec) as with_graph:
                yield case.model_copy(update={"subject": with_graph})


def steps_of(backend: str, rungs: Rungs, device: torch.device) -> list[tuple[str, tuple[str, ...]]]:
    """Note and left-out rewrites of each rung.  Eager without rewrites is diffusers' module itself."""
    if rungs == "ends":
        return [("all rewrites", ())]
    names = tuple(rewrite.name for rewrite in rewrites_for(backend, device.type))
    added = [(f"+ {name}", names[number + 1 :]) for number, name in enumerate(names)]
    return added if backend == "eager" else [("no rewrites", names), *added]
