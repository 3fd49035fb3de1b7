"""Opens a case: loads its weights, makes its inputs, and gives one call without arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

import svd_engine
from svd_bench.documents.results import Setting
from svd_bench.measuring.memory import release
from svd_bench.subjects.cases import BUNDLED, Case, OpenCase, Subject, checkpoint_of, profile_of
from svd_bench.subjects.peers import PeerBackend, pipeline
from svd_engine.arguments import DTYPES
from svd_engine.backends.registry import BACKENDS
from svd_engine.backends.tensorrt.jit_cache import default_folder
from svd_engine.networks.modules import COMPONENT_OF, Modules
from svd_engine.networks.parity import example_inputs
from svd_engine.residency.resident import Resident
from svd_engine.spec.model import Architecture
from svd_engine.spec.network import Backend, Placement
from svd_engine.spec.precision import Precision
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec

if TYPE_CHECKING:
    from diffusers import StableVideoDiffusionPipeline
    from PIL.Image import Image

    from svd_engine.engine import VideoEngine

PHOTOGRAPH = Path(svd_engine.__file__).parent / "assets" / "coffee.png"
SEED = 0
FPS = 7


class GuidanceScales(TypedDict):
    """Of the first and the last frame."""

    min_guidance_scale: float
    max_guidance_scale: float


class VideoCall(GuidanceScales):
    """Arguments that both pipelines take, but for the generator."""

    image: Image
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    fps: int
    decode_chunk_size: int
    output_type: Literal["pt"]


DIFFUSERS_GUIDANCE: GuidanceScales = {
    "min_guidance_scale": 1.0,
    "max_guidance_scale": 3.0,
}  # defaults of its call
NO_GUIDANCE: GuidanceScales = {"min_guidance_scale": 1.0, "max_guidance_scale": 1.0}


def open_case(case: Case) -> OpenCase:
    """Raises what opening raises: BackendUnavailable, BundleError, CheckpointError, BackendError."""
    subject, setting = case.subject, case.setting
    if case.stage != "whole_video":
        return OpenNetwork(case, open_backend(subject))
    if subject.name == "svd-engine":
        return OpenEngine(engine_of(subject), setting)
    device, dtype = torch.device(subject.device), getattr(torch, subject.dtype)
    compiled = subject.backend == "torch.compile"
    made = pipeline(checkpoint_of(subject.checkpoint, subject.variant), dtype, device, compiled)
    return OpenPipeline(made, subject.backend, setting)


@dataclass(frozen=True)
class OpenBackend:
    """A subject's backend, its architecture, and the rewrites of a component once that is loaded."""

    backend: Backend
    architecture: Architecture
    rewrites: Callable[[str], tuple[str, ...]]


def open_backend(subject: Subject) -> OpenBackend:
    device = torch.device(subject.device)
    if subject.backend in BUNDLED:
        from svd_bench.subjects.one_graph import OneGraph
        from svd_engine.backends.onnxruntime import OrtBackend
        from svd_engine.bundle.reading import Bundle

        if subject.graph is not None:
            only = OneGraph(Path(subject.graph))
            return OpenBackend(
                OrtBackend(only, device), only.record.architecture, lambda _: only.record.rewrites
            )
        assert subject.bundle is not None  # `subjects` made sure
        bundle = Bundle(subject.bundle)
        applied = bundle.manifest.rewrites
        return OpenBackend(
            BACKENDS[subject.backend].open(bundle, device, default_folder()),
            bundle.manifest.model.architecture,
            lambda part: tuple(r.name for r in applied if r.network == part and r.places),
        )
    checkpoint = checkpoint_of(subject.checkpoint, subject.variant)
    architecture = checkpoint.model.architecture
    if subject.name != "svd-engine":
        peer = PeerBackend(checkpoint, device, compiled=subject.backend == "torch.compile")
        return OpenBackend(peer, architecture, lambda _: ())
    from svd_engine.networks.rewrites import rewrites_for

    rewrites = rewrites_for(subject.backend, device.type)
    modules = Modules(checkpoint, subject.without_rewrites, rewrites)
    return OpenBackend(
        BACKENDS[subject.backend].open(modules, device, None),
        architecture,
        lambda part: tuple(a.name for a in modules.applied.get(part, []) if a.places),
    )


def stage_spec(stage: str, setting: Setting, architecture: Architecture, precision: Precision) -> NetworkSpec:
    """The network of a stage; of decoder chunks the first."""
    by_network = {s.network: s for s in reversed(specs_of(profile_of(setting), architecture, precision))}
    return by_network[stage.removesuffix("_step")]


class OpenNetwork:
    """One network on seeded inputs; of its outputs the first, which it is for."""

    def __init__(self, case: Case, opened: OpenBackend) -> None:
        self.residency = Resident(opened.backend)
        precision = Precision.of(case.subject.dtype)
        spec = stage_spec(case.stage, case.setting, opened.architecture, precision)
        self.network = self.residency.network(spec)
        inputs = example_inputs(spec, opened.architecture.conditioning)
        self.inputs = {name: tensor.to(opened.backend.device) for name, tensor in inputs.items()}
        self.placements: tuple[Placement, ...] = (self.network.placement,)
        self.rewrites = opened.rewrites(COMPONENT_OF[spec.network])

    def __call__(self) -> Tensor:
        return next(iter(self.network(**self.inputs).values()))

    def close(self) -> None:
        self.residency.close()
        del self.network, self.residency
        release()


class OpenEngine:
    """The whole of ours: photograph in memory to frames [1,F,3,H,W] in [0, 1] on the device."""

    def __init__(self, engine: VideoEngine, setting: Setting) -> None:
        engine.set_progress_bar_config(disable=True)
        self.engine = engine
        self.call = video_call(setting)
        self.placements: tuple[Placement, ...] = ()
        self.rewrites: tuple[str, ...] = ()

    def __call__(self) -> Tensor:
        result = self.engine(**self.call, generator=torch.Generator("cpu").manual_seed(SEED))
        report = result.report
        self.placements = tuple(
            Placement(p.backend, p.device, p.dtype, p.detail)
            for stage, p in report.stages.items()
            if stage != "vae_encoder"  # float32 in every dtype
        )
        self.rewrites = tuple(sorted({key.partition("/")[2] for key, n in report.rewrites.items() if n}))
        assert isinstance(result.frames, Tensor)  # its call's output_type says so
        return result.frames

    def close(self) -> None:
        self.engine.close()
        release()


class OpenPipeline:
    """The whole of diffusers' pipeline, to the same frames."""

    def __init__(self, made: StableVideoDiffusionPipeline, backend: str, setting: Setting) -> None:
        self.pipeline, self.backend = made, backend
        self.call = video_call(setting)
        self.rewrites: tuple[str, ...] = ()
        self.placements: tuple[Placement, ...] = ()

    def __call__(self) -> Tensor:
        frames: Tensor = self.pipeline(**self.call, generator=torch.Generator("cpu").manual_seed(SEED)).frames
        unet = self.pipeline.unet
        dtype = str(unet.dtype).removeprefix("torch.")
        self.placements = (Placement(self.backend, str(unet.device), dtype, "diffusers' pipeline"),)
        return frames

    def close(self) -> None:
        del self.pipeline
        release()


def engine_of(subject: Subject) -> VideoEngine:
    from svd_engine.engine import VideoEngine

    if subject.bundle is not None:
        return VideoEngine.from_bundle(
            subject.bundle, backend=subject.backend, device=subject.device, memory=None
        )
    names = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
    return VideoEngine.from_checkpoint(
        checkpoint_of(subject.checkpoint, subject.variant),
        backend=subject.backend,
        device=subject.device,
        dtype=names[subject.dtype],
        without_rewrites=subject.without_rewrites,
        memory=None,  # the setting says what is in memory
    )


def video_call(setting: Setting) -> VideoCall:
    """What both pipelines are called with: the photograph that ships with the engine, diffusers' defaults
    but for a setting without guidance.

    Guidance is named, because a checkpoint may have its own for ours, which diffusers does not read.
    """
    from svd_engine.media.image import cover, load_image

    return {
        "image": cover(load_image(PHOTOGRAPH), setting.height, setting.width),
        "height": setting.height,
        "width": setting.width,
        "num_frames": setting.frames,
        "num_inference_steps": setting.steps,
        **(NO_GUIDANCE if setting.guidance == "none" else DIFFUSERS_GUIDANCE),
        "fps": FPS,
        "decode_chunk_size": setting.decode_chunk,
        "output_type": "pt",
    }
