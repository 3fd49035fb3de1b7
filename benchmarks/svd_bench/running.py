"""From what a user asked to a finished document: `svd-bench run` and `svd-bench ladder` without arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from svd_bench.contest import Bench
from svd_bench.environment import environment
from svd_bench.floor import measure_ceiling, profile_of
from svd_bench.harness import timer_for
from svd_bench.ladder import LADDERS, STAGE_OF, Rungs, measure_ladder
from svd_bench.memory import Peaks, peaks_in_child
from svd_bench.nvml import open_gpu
from svd_bench.opening import open_case
from svd_bench.recorder import Recorder, out_folder
from svd_bench.results import Kind, Results, Setting
from svd_bench.stages import STAGES, measure_stages
from svd_bench.subjects import BUNDLED, Subject, check_backends, check_names, checkpoint_of, subjects
from svd_engine.arguments import dtype_name, one_of, torch_dtype
from svd_engine.backends.choose import resolve
from svd_engine.backends.registry import BACKENDS
from svd_engine.bundle.reading import Bundle
from svd_engine.cli import console
from svd_engine.errors import BundleError, SettingsError
from svd_engine.request import Settings
from svd_engine.spec.model import Model
from svd_engine.spec.precision import DType

Say = Callable[[str], None]
WARMUP_ROUNDS = {"cuda": 2, "cpu": 0}  # a GPU's clock rises under load; a CPU's first call has warmed it up


@dataclass(frozen=True)
class Asked:
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


def measure_run(asked: Asked, say: Say) -> Results:
    """Raises SettingsError and whatever opening and checking the subjects raise."""
    for stage in asked.stages:
        one_of("stage", stage, STAGES)
    device = resolve(asked.device)
    backends = asked.backends or ["eager", "compiled" if device.type == "cuda" else "onnxruntime"]
    check_names(backends, asked.peers)
    check_backends(backends, device)
    _check_out(asked)
    (source, variant), dtype, setting = _of_bundle(asked) if asked.bundle else _of_checkpoint(asked, device)
    bundle = str(asked.bundle) if asked.bundle else None
    chosen = subjects(backends, asked.peers, source, str(device), dtype, bundle, variant)
    with _bench(asked, "run", device, [dtype], say) as bench, ready_subjects(chosen, setting, say) as ready:
        measure_stages(bench, ready, setting, asked.stages or STAGES)
        return bench.recorder.results()


def measure_rungs(asked: Asked, rungs: Rungs, say: Say) -> Results:
    for network in asked.stages:
        one_of("network", network, tuple(STAGE_OF))
    for backend in asked.backends or ():
        one_of("backend", backend, LADDERS)
    device = resolve(asked.device)
    check_backends(asked.backends or (), device)
    _check_out(asked)
    (source, variant), dtype, setting = _of_checkpoint(asked, device)
    theirs = dtype if asked.peer_dtype == "auto" else dtype_name(torch_dtype(asked.peer_dtype, device))
    peer = Subject(
        name="diffusers",
        backend="eager",
        checkpoint=source,
        variant=variant,
        device=str(device),
        dtype=theirs,
    )
    with _bench(asked, "ladder", device, [dtype, theirs], say) as bench:
        measure_ladder(bench, peer, dtype, setting, asked.stages, asked.backends or (), rungs)
        return bench.recorder.results()


@contextmanager
def _bench(
    asked: Asked, kind: Kind, device: torch.device, dtypes: Sequence[str], say: Say
) -> Iterator[Bench]:
    gpu, why_not = open_gpu(device)
    path = out_folder(asked.out) / f"{kind}.json" if asked.out else None
    recorder = Recorder(kind, environment(device, gpu, asked.command), path)
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
        peaks=peaks_in_child if asked.memory else lambda case: Peaks(),
        gpu=gpu,
        repeat=asked.repeat,
        warmup=WARMUP_ROUNDS[device.type],
        say=say,
    )


def _check_out(asked: Asked) -> None:
    """Before the work starts; `_bench` says the file's name."""
    if asked.out is not None:
        console.check_folder(out_folder(asked.out) / "results.json")


Weights = tuple[str, str | None]  # a checkpoint's source, and the variant of its files


def _of_checkpoint(asked: Asked, device: torch.device) -> tuple[Weights, DType, Setting]:
    """Weights, dtype and setting."""
    assert asked.checkpoint is not None
    dtype = dtype_name(torch_dtype(asked.dtype, device))
    model = checkpoint_of(asked.checkpoint, asked.variant).model
    frames, height, width = _size(asked, (model.frames, model.height, model.width))
    Settings(frames, height, width, steps=asked.steps, decode_chunk_size=asked.decode_chunk).check_size(
        model.architecture.size_multiple
    )
    setting = _setting(asked, model, frames, height, width, asked.decode_chunk or frames)
    return (asked.checkpoint, asked.variant), dtype, setting


def _of_bundle(asked: Asked) -> tuple[Weights, DType, Setting]:
    """The same, of the bundle's first profile or the one that is asked for; its checkpoint must be there."""
    assert asked.bundle is not None
    bundle = Bundle(asked.bundle)
    manifest = bundle.manifest
    own = manifest.profiles[0]
    frames, height, width = _size(asked, (own.frames, own.height, own.width))
    profile = bundle.profile_for(Settings(frames, height, width, decode_chunk_size=asked.decode_chunk))
    if profile.batch != 1:
        raise SettingsError(
            f"profile of bundle {asked.bundle}",
            expected="batch 1, one video a call",
            got=f"batch {profile.batch}",
            remedy="Export one with --batch 1.",
        )
    source = manifest.source
    digest = checkpoint_of(source.checkpoint, source.variant).digest()
    if digest != source.digest:
        raise BundleError(
            f"checkpoint {source.checkpoint} of bundle {asked.bundle}",
            expected=f"the one that the bundle was made from, digest {source.digest}",
            got=f"digest {digest}",
            remedy="Outputs are held against it: bring back the original, or export again.",
        )
    setting = _setting(asked, manifest.model, frames, height, width, profile.decode_chunk)
    weights = (source.checkpoint, source.variant)
    return weights, manifest.precision.activations, setting.model_copy(update={"guidance": profile.guidance})


def _size(asked: Asked, own: tuple[int, int, int]) -> tuple[int, int, int]:
    frames, height, width = (
        default if value is None else value
        for value, default in zip((asked.frames, asked.height, asked.width), own, strict=True)
    )
    return frames, height, width


def _setting(asked: Asked, model: Model, frames: int, height: int, width: int, chunk: int) -> Setting:
    return Setting(
        model=model.name,
        random_weights=model.random_weights,
        frames=frames,
        height=height,
        width=width,
        decode_chunk=min(chunk, frames),
        steps=asked.steps,
    )


@contextmanager
def ready_subjects(chosen: Sequence[Subject], setting: Setting, say: Say) -> Iterator[list[Subject]]:
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
