"""`VideoEngine`: what users call.  Runs the pipeline over a bundle or a checkpoint (`source`).

Holds no tensor arithmetic: pixels are made in `image`, the story is in `pipeline`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svd_engine import image as images
from svd_engine import pipeline, report, video
from svd_engine.arguments import CALLBACK_TENSORS, OUTPUT_TYPES, check_generators, one_of
from svd_engine.backends.jit_cache import check_folder, default_folder
from svd_engine.backends.network import Network
from svd_engine.clock import Clock
from svd_engine.networks.spec import NetworkSpec, Profile, specs_of
from svd_engine.settings import Settings
from svd_engine.source import Source, of_bundle, of_checkpoint

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.checkpoint import Checkpoint


Callback = Callable[["VideoEngine", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
Frames = Any  # list of lists of PIL images, numpy array, or tensor: what `output_type` says


@dataclass(frozen=True)
class VideoOutput:
    """`frames` as diffusers gives them; `report` says how they were made."""

    frames: Frames
    report: report.RunReport


class VideoEngine:
    """Image to video.  Make one with `from_bundle` or `from_checkpoint`; use it as a function.

    One engine serves one call at a time.  `close()`, or leaving a `with` block, frees its memory.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.model, self.backend = source, source.model, source.backend
        self.choice, self.default = source.choice, source.default
        self._open: dict[str, Network] = {}

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        *,
        backend: str = "auto",
        device: str = "auto",
        swap_networks: bool = False,
        jit_cache: str | Path | None = "auto",
    ) -> VideoEngine:
        """Over an exported bundle.  Raises BundleError, BackendUnavailable, OutputError, SettingsError.

        swap_networks: hold one network at a time, opened for its stage and closed after it.
        jit_cache: folder that keeps the kernels which tensorrt-rtx compiles on this GPU at the first launch;
        "auto" is the user's cache folder, None keeps none.  Other backends compile nothing then.
        """
        kept = default_folder() if jit_cache == "auto" else jit_cache and check_folder(Path(jit_cache))
        return cls(of_bundle(folder, backend, device, swap_networks, kept or None))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | Checkpoint,
        *,
        backend: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        without_rewrites: Collection[str] = (),
        swap_networks: bool = False,
    ) -> VideoEngine:
        """Over torch modules: a name, a local diffusers folder or a hub id; any size and frame count.

        dtype: fp32, fp16, bf16, or auto (fp16 on a GPU, fp32 on the CPU).  swap_networks: keep one
        network at a time on the device, the others in host memory.  Raises CheckpointError,
        BackendUnavailable, SettingsError.
        """
        return cls(of_checkpoint(checkpoint, backend, device, dtype, without_rewrites, swap_networks))

    @torch.no_grad()
    def __call__(
        self,
        image: Image | list[Image] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 25,
        sigmas: Sequence[float] | None = None,
        min_guidance_scale: float = 1.0,
        max_guidance_scale: float = 3.0,
        fps: int = 7,
        motion_bucket_id: int = 127,
        noise_aug_strength: float = 0.02,
        decode_chunk_size: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        return_dict: bool = True,
    ) -> VideoOutput | Frames:
        """Animates the image(s).  Arguments as in diffusers' `StableVideoDiffusionPipeline.__call__`.

        height, width, num_frames: None means the bundle's or checkpoint's own (576x1024 and 14 or 25
        for SVD).  image: PIL image, list of them, or tensor [N,3,H,W] in [0, 1].
        output_type: "pil" lists of images, "np" [N,F,H,W,3] and "pt" [N,F,3,H,W] in [0, 1],
        "latent" [N,F,4,h,w].  With return_dict off the frames alone are returned.

        Raises SettingsError (ProfileError when a static bundle cannot do it), ImageError, BackendError.
        """
        started = time.perf_counter()
        settings = Settings(
            frames=num_frames if num_frames is not None else self.default.frames,
            height=height if height is not None else self.default.height,
            width=width if width is not None else self.default.width,
            steps=num_inference_steps,
            sigmas=None if sigmas is None else tuple(float(s) for s in sigmas),
            min_guidance_scale=min_guidance_scale,
            max_guidance_scale=max_guidance_scale,
            fps=fps,
            motion_bucket_id=motion_bucket_id,
            noise_aug_strength=noise_aug_strength,
            decode_chunk_size=decode_chunk_size,
            videos_per_image=num_videos_per_prompt,
        )
        settings.check_size(self.model.architecture.size_multiple)
        one_of("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)

        device, arch = self.backend.device, self.model.architecture
        clock = Clock(device)
        with clock.stage("preprocess"):
            pixels = images.to_vae_pixels(image, settings.height, settings.width).to(device)
            clip = images.to_clip_pixels(image, arch.clip_size, self.model.clip_mean, self.model.clip_std)
            clip = clip.to(device)
        videos = len(pixels) * settings.videos_per_image
        check_generators(generator, videos)
        with clock.stage("load"):
            stages = self._stages(self.source.profile_for(settings, videos))
        if cold := [network for network in self._open.values() if network.needs_warm_up]:
            with clock.stage("compile_kernels"):
                for network in cold:
                    network.warm_up()

        def on_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
            return callback_on_step_end(self, step, timestep, given).pop("latents", x)

        result = pipeline.generate(
            stages, self.model, settings, pixels, clip, generator, latents, on_step, clock,
            decode=output_type != "latent",
        )  # fmt: skip
        with clock.stage("postprocess"):
            frames = present(result, output_type)
        if not return_dict:
            return frames
        total_ms = (time.perf_counter() - started) * 1e3
        return VideoOutput(frames, self._report(stages, settings, generator, clock, total_ms))

    def close(self) -> None:
        """Frees networks and weights.  The engine can be called again; it then loads them again."""
        for network in self._open.values():
            network.close()
        self._open.clear()
        self.backend.close()

    def __enter__(self) -> VideoEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stages(self, profile: Profile) -> pipeline.Stages:
        specs = specs_of(profile, self.model.architecture)
        image_encoder, vae_encoder, denoiser, *decoders = [self._network(spec) for spec in specs]
        by_frames = {d.spec.inputs[0].shape[0]: d for d in decoders}
        return pipeline.Stages(profile, image_encoder, vae_encoder, denoiser, by_frames)

    def _network(self, spec: NetworkSpec) -> Network:
        if spec.key not in self._open:
            self._open[spec.key] = self.backend.open(spec)
        return self._open[spec.key]

    def _report(
        self, stages: pipeline.Stages, settings: Settings, generator: Any, clock: Clock, total_ms: float
    ) -> report.RunReport:
        generators = generator if isinstance(generator, list) else [generator] if generator else []
        used = [stages.image_encoder, stages.vae_encoder, stages.denoiser, *stages.vae_decoders.values()]
        return report.RunReport(
            model=self.model.name,
            random_weights=self.model.random_weights,
            source=self.source.name,
            profile=str(stages.profile),
            settings=settings,
            seeds=[g.initial_seed() for g in generators],
            chosen_because=self.choice.reason,
            stages={n.spec.network: report.StagePlacement(**asdict(n.placement)) for n in used},
            rewrites=self.source.rewrites(),
            without_rewrites=list(self.source.without_rewrites),
            swap_networks=self.source.swap_networks,
            stage_ms=clock.stages,
            step_ms=clock.steps,
            total_ms=total_ms,
            peak_host_bytes=report.peak_host_bytes(),
            peak_device_bytes=report.peak_device_bytes(self.backend.device),
            versions=report.versions(),
        )


def present(result: Tensor, output_type: str) -> Frames:
    """Frames [N,F,3,H,W] in [0, 1], or latents, in the form that the caller asked for."""
    if output_type in ("pt", "latent"):
        return result
    if output_type == "np":
        return result.permute(0, 1, 3, 4, 2).cpu().numpy()
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video.to_uint8(one)] for one in result]
