"""From what a user asked to a finished document: `svd-bench run` and `svd-bench ladder` without arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from svd_bench.contest.contest import Bench
from svd_bench.contest.ladder import LADDERS, STAGE_OF, Rungs, measure_ladder
from svd_bench.contest.stages import measure_stages
from svd_bench.documents.recorder import Recorder, out_folder
from svd_bench.documents.results import STAGES, DocumentKind, Results, Setting
from svd_bench.measuring.ceiling import measure_ceiling
from svd_bench.measuring.environment import environment
from svd_bench.measuring.memory import Peaks
from svd_bench.measuring.nvml import open_gpu
from svd_bench.measuring.progress import Progress
from svd_bench.measuring.timing import timer_for
from svd_bench.memory.peaks import peaks_in_child
from svd_bench.subjects.cases import (
    BUNDLED,
    Subject,
    check_backends,
    check_names,
    checkpoint_of,
    profile_of,
    subjects,
)
from svd_bench.subjects.opening import NO_GUIDANCE, open_case
from svd_engine.arguments import dtype_name, torch_dtype
from svd_engine.backends.choose import resolve
from svd_engine.backends.registry import BACKENDS
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BundleError, SettingsError
from svd_engine.request import Settings
from svd_engine.spec.model import Model
from svd_engine.spec.precision import DType
from svd_engine.values import one_of

WARMUP_ROUNDS = {"cuda": 2, "cpu": 0}  # a GPU's clock rises under load; a CPU's first call has warmed it up


@dataclass(frozen=True)
class RunOptions:
    """The arguments of a command; None means that the command chooses."""

    bundle: Path | None
    checkpoint: str | None  # one of the two is given
    variant: str | None  # of the checkpoint's weight files; a bundle's manifest names its own
    backends: list[str] | None
    peers: list[str]
    stages: list[str]  # of the ladder, networks
    frames: int | None
    height: int | None
    width: int | None
    decode_chunk: int | None
    dtype: str  # "auto", "fp32", ...
    device: str
    steps: int
    repeat: int
    memory: bool
    out: Path | None
    command: Sequence[str]
    peer_dtype: str = "auto"  # of the ladder; "auto": as ours
    guidance: bool = True  # off: one half of each step alone, as few-step models take it


def measure_run(options: RunOptions, say: Progress) -> Results:
    """Raises SettingsError and whatever opening and checking the subjects raise."""
    for stage in options.stages:
        one_of("stage", stage, STAGES)
    device = resolve(options.device)
    backends = options.backends or ["eager", "compiled" if device.type == "cuda" else "onnxruntime"]
    check_names(backends, options.peers)
    check_backends(backends, device)
    _check_out(options)
    (source, variant), dtype, setting = (
        _of_bundle(options) if options.bundle else _of_checkpoint(options, device)
    )
    bundle = str(options.bundle) if options.bundle else None
    chosen = subjects(backends, options.peers, source, str(device), dtype, bundle, variant)
    with _bench(options, "run", device, [dtype], say) as bench, ready_subjects(chosen, setting, say) as ready:
        measure_stages(bench, ready, setting, options.stages or STAGES)
        return bench.recorder.results()


def measure_rungs(options: RunOptions, rungs: Rungs, say: Progress) -> Results:
    for network in options.stages:
        one_of("network", network, tuple(STAGE_OF))
    for backend in options.backends or ():
        one_of("backend", backend, LADDERS)
    device = resolve(options.device)
    check_backends(options.backends or (), device)
    _check_out(options)
    (source, variant), dtype, setting = _of_checkpoint(options, device)
    theirs = dtype if options.peer_dtype == "auto" else dtype_name(torch_dtype(options.peer_dtype, device))
    peer = Subject(
        name="diffusers",
        backend="eager",
        checkpoint=source,
        variant=variant,
        device=str(device),
        dtype=theirs,
    )
    with _bench(options, "ladder", device, [dtype, theirs], say) as bench:
        measure_ladder(bench, peer, dtype, setting, options.stages, options.backends or (), rungs)
        return bench.recorder.results()


@contextmanager
def _bench(
    options: RunOptions, kind: DocumentKind, device: torch.device, dtypes: Sequence[str], say: Progress
) -> Iterator[Bench]:
    gpu, why_not = open_gpu(device)
    path = out_folder(options.out) / f"{kind}.json" if options.out else None
    recorder = Recorder(kind, environment(device, gpu, options.command), path)
    recorder.warn(why_not)
    timer = timer_for(device, gpu.joules if gpu else lambda: None)
    say("ceiling: matrix products, convolutions, copies")
    recorder.ceiling = measure_ceiling(device, [*dtypes, "float32"], timer)
    recorder.save()
    yield Bench(
        device=device,
        timer=timer,
        recorder=recorder,
        ceiling=recorder.ceiling,
        open_case=open_case,
        peaks=peaks_in_child if options.memory else lambda case: Peaks(),
        gpu=gpu,
        repeat=options.repeat,
        warmup=WARMUP_ROUNDS[device.type],
        say=say,
    )


def _check_out(options: RunOptions) -> None:
    """Before the work starts; `_bench` says the file's name."""
    if options.out is not None:
        out_folder(options.out)


Weights = tuple[str, str | None]  # a checkpoint's source, and the variant of its files


def _of_checkpoint(options: RunOptions, device: torch.device) -> tuple[Weights, DType, Setting]:
    """Weights, dtype and setting."""
    assert options.checkpoint is not None
    dtype = dtype_name(torch_dtype(options.dtype, device))
    model = checkpoint_of(options.checkpoint, options.variant).model
    frames, height, width = _size(options, (model.frames, model.height, model.width))
    Settings(frames, height, width, steps=options.steps, decode_chunk_size=options.decode_chunk).check_size(
        model.architecture.size_multiple
    )
    setting = _setting(options, model, frames, height, width, options.decode_chunk or frames)
    return (options.checkpoint, options.variant), dtype, setting


def _of_bundle(options: RunOptions) -> tuple[Weights, DType, Setting]:
    """The same, of the bundle's first profile or the one that is asked for; its checkpoint must be there."""
    assert options.bundle is not None
    bundle = Bundle(options.bundle)
    manifest = bundle.manifest
    own = manifest.profiles[0]
    frames, height, width = _size(options, (own.frames, own.height, own.width))
    asked = Settings(frames, height, width, decode_chunk_size=options.decode_chunk)
    if not options.guidance:
        asked = replace(asked, **NO_GUIDANCE)
    profile = bundle.profile_for(asked)
    if profile.batch != 1:
        raise SettingsError(
            f"profile of bundle {options.bundle}",
            expected="batch 1, one video a call",
            got=f"batch {profile.batch}",
            remedy="Export one with --batch 1.",
        )
    if not options.guidance and profile.guidance != "single":
        raise SettingsError(
            f"profile of bundle {options.bundle}",
            expected="single guidance, for a step without guidance to be half the work",
            got=f"{profile.guidance} guidance",
            remedy="Export one with --guidance single.",
        )
    source = manifest.source
    if source.parts or source.lora:
        raise BundleError(
            f"bundle {options.bundle}",
            expected="one of a whole checkpoint: documents name it by its source alone",
            got=f"one of {manifest.export_source}",
            remedy="Make a folder of that once, export it and measure that bundle. "
            f"Run: svd-export convert {manifest.export_source} -o FOLDER",
        )
    digest = checkpoint_of(source.checkpoint, source.variant).digest()
    if digest != source.digest:
        raise BundleError(
            f"checkpoint {source.checkpoint} of bundle {options.bundle}",
            expected=f"the one that the bundle was made from, digest {source.digest}",
            got=f"digest {digest}",
            remedy="Outputs are held against it: bring back the original, or export again.",
        )
    setting = _setting(options, manifest.model, frames, height, width, profile.decode_chunk)
    weights = (source.checkpoint, source.variant)
    if options.guidance:
        setting = setting.model_copy(update={"guidance": profile.guidance})
    return weights, manifest.precision.activations, setting


def _size(options: RunOptions, own: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = (
        default if value is None else value
        for value, default in zip((options.frames, options.height, options.width), own, strict=True)
    )
    return frames, height, width


def _setting(options: RunOptions, model: Model, frames: int, height: int, width: int, chunk: int) -> Setting:
    return Setting(
        model=model.name,
        random_weights=model.random_weights,
        frames=frames,
        height=height,
        width=width,
        decode_chunk=min(chunk, frames),
        guidance="batched" if options.guidance else "none",
        steps=options.steps,
    )


@contextmanager
def ready_subjects(chosen: Sequence[Subject], setting: Setting, say: Progress) -> Iterator[list[Subject]]:
    """Subjects that can be opened: without a bundle of the user's, one is made and removed again."""
    needy = [s for s in chosen if s.backend in BUNDLED and not s.bundle]
    if not needy:
        yield list(chosen)
        return
    from svd_export.to_onnx import export_bundle

    with tempfile.TemporaryDirectory(prefix="svd-bench-") as folder:
        made = Path(folder, "bundle")
        checkpoint, dtype = (
            checkpoint_of(needy[0].checkpoint, needy[0].variant),
            getattr(torch, needy[0].dtype),
        )
        export_bundle(
            checkpoint, made, [profile_of(setting)], dtype, (), lambda line: say(f"exporting {line}")
        )
        flavours = {s.backend for s in needy if BACKENDS[s.backend].runs == "plans"}
        for flavour in sorted(flavours):
            from svd_export.to_tensorrt import build_plans

            build_plans(Bundle(made), progress=lambda line: say(f"TensorRT, {line}"), flavour=flavour)
        yield [s.model_copy(update={"bundle": str(made)}) if s in needy else s for s in chosen]
