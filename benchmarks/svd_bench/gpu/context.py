"""What the stages of the GPU check share: opened networks, so that nothing is drawn or compiled twice.

Weights are drawn on the device: a UNet's 1.5 billion numbers take a second there and a minute on a host.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from svd_bench.contest.contest import Bench, contest
from svd_bench.documents.recorder import Recorder
from svd_bench.documents.results import Setting
from svd_bench.measuring.memory import Peaks, PeakSampler, release
from svd_bench.measuring.nvml import Gpu
from svd_bench.measuring.progress import Progress
from svd_bench.measuring.timing import Timer
from svd_bench.subjects.cases import BUNDLED, Case, OpenCase, Subject, profile_of
from svd_bench.subjects.flop import stage_flop
from svd_bench.subjects.opening import OpenBackend, OpenEngine, OpenNetwork, OpenPipeline
from svd_bench.subjects.peers import PeerBackend, PeerNetwork, pipeline
from svd_engine.backends.choose import Choice
from svd_engine.backends.registry import BACKENDS
from svd_engine.backends.tensorrt.jit_cache import default_folder
from svd_engine.backends.tensorrt.network import TrtNetwork
from svd_engine.backends.torch.compiled import CompiledBackend
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.configs import describe
from svd_engine.checkpoint.opening import Checkpoint, Component, random_checkpoint
from svd_engine.checkpoint.random_weights import small_configs, statistics
from svd_engine.checkpoint.safetensors_header import Stated
from svd_engine.checkpoint.weights import Shapes
from svd_engine.engine import VideoEngine
from svd_engine.networks.modules import Modules
from svd_engine.residency.resident import Resident
from svd_engine.residency.source import EngineSource
from svd_engine.spec.network import Backend, Network
from svd_engine.spec.precision import DType, Precision
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec

TINY_UNET = {
    "sample_size": [16, 16],
    "block_out_channels": [32, 32],
    "num_attention_heads": [1, 1],
    "down_block_types": ["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"],
    "up_block_types": ["UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"],
}
TINY_VAE = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2}


@dataclass(frozen=True)
class DeviceWeights:
    """Seeded random weights as `svd_engine.checkpoint.random_weights` draws, on a device."""

    device: torch.device

    def tensors(self, component: Component, expected: Shapes, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator(self.device)

        def draw(name: str, shape: tuple[int, ...]) -> Tensor:
            generator.manual_seed(zlib.crc32(f"{component}.{name}".encode()))
            mean, deviation = statistics(name, shape)
            uniform = torch.rand(shape, generator=generator, device=self.device)
            return ((uniform - 0.5) * (sqrt(12) * deviation) + mean).to(dtype)

        return {name: draw(name, shape) for name, shape in expected.items()}

    def files(self, _component: Component) -> list[Path]:
        return []

    def stated(self, _component: Component) -> list[Stated]:
        return []

    def identity(self, _component: Component) -> Iterator[bytes]:
        yield f"random weights drawn on {self.device}".encode()


class CachedBackend:
    """A backend that opens each network once, and keeps it when the one who asked closes."""

    def __init__(self, backend: Backend, rewrites: Callable[[str], tuple[str, ...]]) -> None:
        self.backend, self.name, self.device = backend, backend.name, backend.device
        self.movable = backend.movable
        self.rewrites = rewrites
        self.networks: dict[str, Network] = {}

    def open(self, spec: NetworkSpec) -> Network:
        if spec.key not in self.networks:
            self.networks[spec.key] = self.backend.open(spec)
        return self.networks[spec.key]

    def close(self) -> None:
        """Networks stay until the process ends."""


class CachedNetwork(OpenNetwork):
    def close(self) -> None:
        release()


class CachedEngine(OpenEngine):
    def close(self) -> None:
        release()


class Context:
    """SVD-XT's full size on a GPU; on the CPU the same on networks of some hundred thousand weights."""

    def __init__(
        self,
        device: torch.device,
        gpu: Gpu | None,
        timer: Timer,
        recorder: Recorder,
        say: Progress,
    ) -> None:
        self.device, self.gpu, self.timer, self.recorder, self.say = device, gpu, timer, recorder, say
        self.full = device.type == "cuda"
        self.dtype: DType = "float16" if self.full else "float32"
        self.checkpoint = random_checkpoint("svd-xt") if self.full else tiny_checkpoint()
        self.checkpoint = replace(self.checkpoint, weights=DeviceWeights(device))
        self.modules = Modules(self.checkpoint)
        self._backends: dict[Subject, CachedBackend] = {}

    def setting(self, frames: int = 25) -> Setting:
        """Native size, 25 steps.  SVD's 14 frames run on the same weights: one architecture serves both."""
        model = self.checkpoint.model
        count = frames if self.full else 2
        return Setting(
            model=("svd" if frames == 14 else "svd-xt") if self.full else model.name,
            random_weights=True,
            frames=count,
            height=model.height,
            width=model.width,
            decode_chunk=count,
            steps=25 if self.full else 2,
        )

    def subject(self, name: str, backend: str) -> Subject:
        return Subject.model_validate(
            {
                "name": name,
                "backend": backend,
                "checkpoint": self.checkpoint.source,
                "device": str(self.device),
                "dtype": self.dtype,
            }
        )

    def contest(self, stage: str, setting: Setting, subjects: Sequence[Subject], repeat: int) -> None:
        """Rows of a stage, the first subject's output being the reference."""
        if self.recorder.ceiling is None:
            raise Skipped("the ceiling, which it is held against, was not measured")
        bench = Bench(
            device=self.device,
            timer=self.timer,
            recorder=self.recorder,
            ceiling=self.recorder.ceiling,
            open_case=self.open_case,
            peaks=self.peaks,
            gpu=self.gpu,
            repeat=repeat if self.full else 1,
            warmup=1 if self.full and stage != "whole_video" else 0,
            say=self.say,
        )
        flop = stage_flop(stage, setting, self.checkpoint.model.architecture, self.checkpoint.configs)
        contest(bench, [Case(subject=s, stage=stage, setting=setting) for s in subjects], None, flop)

    def opened(self, subject: Subject) -> OpenBackend:
        """The subject's backend, kept; eager and compiled share one set of weights."""
        if subject not in self._backends:
            self._backends[subject] = self._open(subject)
        kept = self._backends[subject]
        return OpenBackend(kept, self.checkpoint.model.architecture, kept.rewrites)

    def drop(self, subject: Subject) -> None:
        """Closes what `opened` keeps of a subject."""
        kept = self._backends.pop(subject, None)
        if kept is not None:
            for network in kept.networks.values():
                network.close()
            kept.backend.close()
            release()

    def _open(self, subject: Subject) -> CachedBackend:
        if subject.backend in BUNDLED and subject.bundle is not None:
            bundle = Bundle(subject.bundle)
            applied = [r for r in bundle.manifest.rewrites if r.places]
            backend = BACKENDS[subject.backend].open(bundle, self.device, default_folder())
            return CachedBackend(backend, lambda part: tuple(r.name for r in applied if r.network == part))
        if subject.name != "svd-engine":
            compiled = subject.backend == "torch.compile"
            return CachedBackend(PeerBackend(self.checkpoint, self.device, compiled), lambda _: ())
        compiled = subject.backend == "compiled"
        kind = CompiledBackend if compiled else EagerBackend
        ours: Backend = kind(self.modules, self.device)
        return CachedBackend(
            ours, lambda part: tuple(a.name for a in self.modules.applied.get(part, []) if a.places)
        )

    def open_case(self, case: Case) -> OpenCase:
        if case.stage != "whole_video":
            return CachedNetwork(case, self.opened(case.subject))
        if case.subject.name == "svd-engine":
            return CachedEngine(self.engine(case), case.setting)
        compiled = case.subject.backend == "torch.compile"
        made = pipeline(self.checkpoint, getattr(torch, self.dtype), self.device, compiled)
        return OpenPipeline(made, case.subject.backend, case.setting)

    def engine(self, case: Case) -> VideoEngine:
        """Over the networks that other stages have opened, and compiled, before."""
        profile = profile_of(case.setting)
        source = EngineSource(
            name=self.checkpoint.source,
            model=self.checkpoint.model,
            precision=Precision.of(self.dtype),
            residency=Resident(self.opened(case.subject).backend),
            choice=Choice(case.subject.backend, self.device, "asked for"),
            default=profile,
            profile_for=lambda _settings, _videos: profile,
            rewrites=self.modules.places,
            weights=list,
        )
        return VideoEngine(source)

    def peaks(self, case: Case) -> Peaks:
        """In this process: what a call adds to the subject's own weights.  Less exact than a child's."""
        if not self.full:
            return Peaks()
        few = case.setting.model_copy(update={"steps": 2})  # of a video; more need no more memory
        running = self.open_case(case.model_copy(update={"setting": few}))
        running()
        release()
        own = sum(tensor.nbytes for tensor in self.weights_of(running))
        torch.cuda.reset_peak_memory_stats(self.device)
        others = torch.cuda.memory_allocated(self.device) - own
        with PeakSampler(self.gpu.used_bytes if self.gpu else lambda: 0) as driver:
            self.timer.lap(running)
        peak = torch.cuda.max_memory_allocated(self.device) - others
        running.close()
        return Peaks(driver=driver.peak - others if self.gpu else None, torch=peak)

    def weights_of(self, running: OpenCase) -> list[Tensor]:
        """Each once, whichever networks share it."""
        modules: list[nn.Module] = []
        if isinstance(running, OpenPipeline):
            modules = [part for part in running.pipeline.components.values() if isinstance(part, nn.Module)]
        elif isinstance(running, OpenNetwork) and isinstance(running.network, PeerNetwork):
            modules = [running.network.module]
        elif isinstance(running, OpenNetwork) and isinstance(running.network, TrtNetwork):
            modules = []  # TensorRT's own, outside torch's allocator
        elif isinstance(running, OpenNetwork):
            modules = [self.modules.network(running.network.spec)]
        elif isinstance(running, OpenEngine):
            precision = running.engine.source.precision
            specs = specs_of(running.engine.default, self.checkpoint.model.architecture, precision)
            modules = [self.modules.network(spec) for spec in specs]
        return list({id(p): p.detach() for module in modules for p in module.parameters()}.values())


class Skipped(Exception):
    """A stage that cannot run here, and why."""


def tiny_checkpoint() -> Checkpoint:
    configs = small_configs()
    configs["unet"] |= TINY_UNET
    configs["vae"] |= TINY_VAE
    model = describe("tiny", "tiny", configs, random_weights=True)
    return replace(random_checkpoint("svd"), model=model, source="tiny", configs=configs)
