"""`VideoEngine`: what users call.  Runs the pipeline over a bundle or a checkpoint (`source`).

Holds no tensor arithmetic: `image` makes the pixels, `pipeline` has the stages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svd_engine import pipeline, report
from svd_engine.arguments import (
    CALLBACK_TENSORS,
    OUTPUT_TYPES,
    check_callback,
    check_generators,
    check_watchers,
    returned_tensors,
)
from svd_engine.backends.interruptible import InterruptibleNetwork
from svd_engine.backends.registry import BACKENDS
from svd_engine.call_queue import CallQueue, Cancel, Turn
from svd_engine.clock import Clock
from svd_engine.errors import SettingsError
from svd_engine.guidance_parallel import OtherHalf
from svd_engine.image_conditioning import ImageConditioning
from svd_engine.media import image as images
from svd_engine.observer import UNOBSERVED, Observer
from svd_engine.output import VideoOutput, present
from svd_engine.request import SETTINGS, Settings, check_together, own_values
from svd_engine.residency.budget import Memory
from svd_engine.residency.plan import Plan
from svd_engine.residency.planner import Planner
from svd_engine.residency.shortage import shortage
from svd_engine.residency.source import EngineSource, of_bundle, of_checkpoint
from svd_engine.residency.swapped import Swapped
from svd_engine.sampling.presets import PRESETS
from svd_engine.sampling.reuse import ReusePolicy
from svd_engine.spec.network import Backend
from svd_engine.spec.reuse import Reuse
from svd_engine.spec.tables import specs_of
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.steering import Steered
from svd_engine.torch_state import own_torch_state
from svd_engine.unsupported import DiffusersNames
from svd_engine.values import Fit, one_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from svd_engine.checkpoint.opening import Checkpoint
    from svd_engine.spec.weights import Component

notices = logging.getLogger("svd_engine.notices")

Callback = Callable[["VideoEngine", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class VideoEngine(Steered, DiffusersNames):
    """Generate videos from images.  Open one with `from_bundle` or `from_checkpoint`, and call it.

    Calls from several threads run one after the other, in the order of their arrival.  `close()`, or leaving
    a `with` block, frees the memory.  Processes that use an engine are started with "spawn", not forked.
    """

    def __init__(self, source: EngineSource) -> None:
        self.source, self.model, self.residency = source, source.model, source.residency
        self.other_half = source.other_half
        self.choice, self.default = source.choice, source.default
        self._calls = CallQueue()
        self._last_plan: Plan | None = None  # within a memory budget

    @classmethod
    def from_bundle(
        cls,
        folder: str | Path,
        *,
        backend: str = "auto",
        device: str | torch.device = "auto",
        swap_networks: bool = False,
        jit_cache: str | Path | None = "auto",
        reuse: Reuse | None = None,
        memory: Memory | None = "auto",
        devices: Sequence[str | torch.device] | None = None,
    ) -> VideoEngine:
        """Open a bundle that svd-export wrote.

        backend: "onnxruntime", "tensorrt", "tensorrt-rtx" or "auto".  device: "cpu", "cuda", "cuda:N" or
        "auto".  swap_networks: hold one network in memory at a time, opened for its stage and closed after
        it.  jit_cache: folder that keeps the kernels which tensorrt-rtx compiles on this GPU at the first
        launch; "auto" is the user's cache folder, None keeps none.  Other backends compile nothing then.
        reuse: run part of the denoiser only in some evaluations, `Reuse(interval=2)` say, over a bundle that
        was exported with `--reuse-branch`.  Lossy: the report says in which.
        memory: what the process may take of a GPU's memory, or of the host's where networks run on the CPU:
        "8GiB", "0.9" of it all, or bytes.  Each call then takes the fastest plan that stays below, or is
        refused with what would fit.  "auto" is 90 % of what is free when networks are first loaded: a call
        runs as without a limit where that fits, then in the fastest way that does, and is refused only when
        it surely needs more than there is.  None sets no limit.  Of two devices each may take as much.
        An amount is for all engines of a process together: counted are this one's networks, what the process
        has taken when they are first loaded, and what engines with a budget of their own have loaded since.
        devices: two, in place of `device`: each runs one half of guidance, at the same time, with the same
        result.  The first does all the rest.  The bundle must have a profile of single guidance.
        Raises BundleError, BackendUnavailable, OutputError, SettingsError (ProfileError for reuse that the
        bundle does not hold).
        """
        return cls(of_bundle(folder, backend, device, swap_networks, jit_cache, memory, reuse, devices))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path | Checkpoint,
        *,
        backend: str = "auto",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        variant: str | None = None,
        frames: int | None = None,
        parts: Mapping[Component, str | Path] | None = None,
        lora: Mapping[str | Path, float] | None = None,
        lora_partial: bool = False,
        without_rewrites: Collection[str] = (),
        swap_networks: bool = False,
        reuse: Reuse | None = None,
        memory: Memory | None = "auto",
        devices: Sequence[str | torch.device] | None = None,
    ) -> VideoEngine:
        """Open a checkpoint as torch modules: a name, a diffusers folder, a single file or a hub id.

        Calls may have any size and number of frames.

        backend: "eager", "compiled" or "auto".  device: "cpu", "cuda", "cuda:N" or "auto".
        dtype: "fp32", "fp16", "bf16", torch's own, or "auto" (fp16 on a GPU, fp32 on the CPU).
        variant: of the weight files, as in diffusers' `from_pretrained`; None reads those without one,
        whatever the dtype.  frames: that a single file's model was trained on, 14 or 25, where its name does
        not tell.  parts: by "unet", "vae" or "image_encoder", a file or folder from which this component
        comes instead.  lora: LoRA files with a scale each, such as {"style.safetensors": 0.8}, fused into the
        UNet's weights.  lora_partial: leave out keys of these that fit no weight, instead of refusing them.
        without_rewrites: names of exact rewrites to switch off.
        swap_networks: keep one network at a time on the device, the others in host memory; on the CPU load
        each for its stage.
        memory: what the process may take of a GPU's memory, or of the host's where networks run on the CPU:
        "8GiB", "0.9" of it all, or bytes.  Each call then takes the fastest plan that stays below, or is
        refused with what would fit.  "auto" is 90 % of what is free when networks are first loaded: a call
        runs as without a limit where that fits, then in the fastest way that does, and is refused only when
        it surely needs more than there is.  None sets no limit.  Of two devices each may take as much.
        An amount is for all engines of a process together: counted are this one's networks, what the process
        has taken when they are first loaded, and what engines with a budget of their own have loaded since.
        reuse: run part of the denoiser only in some evaluations, `Reuse(interval=2)` say.  Lossy: the report
        says in which.
        devices: two, in place of `device`: each holds a denoiser and runs one half of guidance, at the same
        time, with the same result.  The first does all the rest.
        Raises CheckpointError, BackendUnavailable, SettingsError.
        """
        return cls(
            of_checkpoint(
                checkpoint,
                backend,
                device,
                dtype,
                without_rewrites,
                swap_networks,
                variant,
                frames,
                parts,
                lora,
                lora_partial,
                reuse,
                memory,
                devices,
            )
        )

    @property
    def backend(self) -> Backend:
        """What runs the networks; `residency` opens them."""
        return self.residency.backend

    @own_torch_state()
    def __call__(
        self,
        image: Image | list[Image] | Tensor | ImageConditioning,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        min_guidance_scale: float | None = None,
        max_guidance_scale: float | None = None,
        fps: int = 7,
        motion_bucket_id: float = 127,
        noise_aug_strength: float | None = None,
        decode_chunk_size: int | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        return_dict: bool = True,
        *,
        cancel: Cancel | None = None,
        observer: Observer | None = None,
        fit: Fit = "stretch",
        sampler: str = "euler",
        schedule: str = "karras",
        guider: str | None = None,
        guidance_scales: Sequence[float] | None = None,
        churn: float = 0.0,
        rho: float | None = None,
        decoding: str = "auto",
        elevation: float | Sequence[float] | None = None,
        azimuths: Sequence[float] | None = None,
    ) -> VideoOutput | Any:  # Any: `VideoFrames` with return_dict off; else none need tell them apart
        """Generate a video of each image.  Arguments as in diffusers' `StableVideoDiffusionPipeline`.

        image: PIL image, list of them, or tensor [N,3,H,W], floats in [0, 1] or bytes.  Of a PIL image with
        transparency SV3D centres what is not transparent on white; what has none it takes as it is.  Or an
        `ImageConditioning`: what encoders of the caller's own gave.
        height, width, num_frames: default the bundle's or checkpoint's own (SVD: 576, 1024 pixels, 14 or 25).
        num_inference_steps: denoising steps; default the model's own (SVD: 25).  sigmas: n + 1 falling noise
        levels for n steps, in their place.
        min_guidance_scale, max_guidance_scale: classifier-free guidance of the first and the last frame, or
        where the `guider` puts them; default the model's own (SVD: 1.0 and 3.0).
        fps: frame rate that SVD's network is told.  motion_bucket_id: 0 to 1023, more is more motion (SVD).
        elevation, azimuths: where the camera is, in degrees (SV3D_p): the elevation of all frames or of each,
        -90 to 90, default 10; the azimuth of each, of which the last is the image's view, default an even
        orbit.
        noise_aug_strength: standard deviation of the noise on the image, whose pixels are in [-1, 1]; default
        the model's own (SVD: 0.02).
        decode_chunk_size: frames decoded at once; default all.  decoding: "whole", all frames at once;
        "streamed", the same video layer by layer over `decode_chunk_size` frames at a time (default 1; of a
        bundle exported with a streamed decoder, its own number), in less memory; "auto", whole or, where
        `decode_chunk_size` is given, chunks of it that know nothing of each other, as diffusers'.
        generator: one for all videos or one for each; latents: unit-variance noise [N,F,4,h,w] to start from.
        fit: resize an image of another aspect ("stretch", as diffusers), crop it in the middle ("crop"), or
        pad it with black ("pad").
        sampler, schedule, guider: names of `svd_engine.sampling.registry`; the defaults are diffusers', the
        guider's is the model's own (SVD: "linear").  A step of "heun" or "dpmpp-2s-ancestral" evaluates the
        denoiser twice.  Noise that a sampler adds is drawn from `generator`.  guidance_scales: a scale for
        each frame, in place of the guider.
        churn: 0 or more, noise that "euler" and "heun" add (S_churn of Karras et al. 2022).
        rho: exponent of the schedule "karras", 0.1 to 1000; default the model's own (SVD: 7).
        output_type: "pil" lists of images, "np" [N,F,H,W,3] and "pt" [N,F,3,H,W] in [0, 1],
        "latent" [N,F,4,h,w].  return_dict=False returns the frames alone.
        callback_on_step_end(engine, step, timestep, {"latents": x}) returns a dict that may replace the
        latents; it may read and set what `Steered` lists, such as `interrupt` and `_guidance_scale`.

        Safe from any thread: calls of one engine run one after the other, in the order of their arrival,
        and the report says how long one waited.  cancel: a `threading.Event`, say, looked at while the
        call waits, before every run of a network and between the slices of a streamed decoder.  observer: is
        told of stages, runs of networks, steps and decoded frames (`svd_engine.observer`).  The caller's
        torch state (grad and inference mode, autocast, default device and dtype) changes nothing and comes
        back as it was; callbacks and observers run in the engine's (`torch_state`), and must not wait for
        another call of the same engine.

        Raises SettingsError (ProfileError when a static bundle cannot do it), ImageError, BackendError
        (OutOfMemory, after which the engine is usable as before), Cancelled.
        """
        settings = self._settings(locals())  # the arguments: nothing else is there yet
        one_of("output_type", output_type, OUTPUT_TYPES)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        check_watchers(cancel, observer)
        pipeline.schedule(settings, self.model)  # raises before anything is opened
        observer = UNOBSERVED if observer is None else observer

        with self._calls.turn(cancel) as turn:
            started = time.perf_counter()
            clock = Clock(self.backend.device, observer)
            with clock.stage("preprocess"):
                pictured = self._pictured(image, settings)
                encoded = isinstance(pictured, ImageConditioning)
            videos = pictured.images * settings.videos_per_image
            check_generators(generator, videos)
            with clock.stage("load"):
                plan = self._plan(settings, videos)
                short = partial(shortage, settings=settings, videos=videos)
                stages, reusing = self._stages(plan, turn, short, observer, encoded)
            others = self.other_half.cold() if self.other_half else []
            if cold := self.residency.cold() + others:
                with clock.stage("compile_kernels"):
                    for network in cold:
                        turn.check()
                        network.warm_up()
            self._steering = pipeline.steering_of(settings, videos, self.backend.device)
            on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
            result = pipeline.generate(
                stages, self.model, settings, pictured, generator, latents, on_step, clock,
                decode=output_type != "latent", steering=self._steering,
                progress=lambda evaluations: self.progress_bar(total=evaluations), observer=observer,
                reusing=reusing,
            )  # fmt: skip
            with clock.stage("postprocess"):
                frames = present(result, output_type)
            if not return_dict:
                return frames
            total_ms = (time.perf_counter() - started) * 1e3
            made = self._report(stages, plan, reusing, settings, generator, clock, turn, total_ms)
            return VideoOutput(frames, made)

    def preset(self, name: str) -> dict[str, Any]:
        """Arguments of a call that others recommend for this model.

        "sgm": Stability's own scripts.  "animatelcm": for AnimateLCM-SVD's UNet.

            engine(image, **engine.preset("sgm"))

        Raises SettingsError for another name, and for a model that the preset does not know.
        """
        return PRESETS[one_of("preset", name, tuple(PRESETS))](self.model)

    def close(self) -> None:
        """Free networks and weights.  A later call loads them again.

        Waits for the running call; those that wait for their turn end with BackendError.  Raises
        BackendError inside a callback of the running call.  Does nothing in a forked child: the memory is
        its parent's.
        """
        if not self._calls.in_opening_process:
            return
        with self._calls.turn(closes=True):
            self.residency.close()
            if self.other_half is not None:
                self.other_half.close()
            if self.source.planner is not None:
                self.source.planner.release()
            self._last_plan = None

    def __enter__(self) -> VideoEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _settings(self, call: Mapping[str, object]) -> Settings:
        """The parameters among the arguments of a call; None takes the profile's or the model's own."""
        values = {p.field: call[p.name] for p in SETTINGS}
        values |= own_values({"profile": self.default, "model": self.model}, call)
        settings = Settings(**values)  # type: ignore[arg-type]  # it checks each
        check_together(call)
        settings.check_told(self.model.name, self.model.architecture.conditioning.names)
        settings.check_size(self.model.architecture.size_multiple)
        return settings

    def _pictured(
        self, image: Image | list[Image] | Tensor | ImageConditioning, settings: Settings
    ) -> pipeline.ImagePixels | ImageConditioning:
        """What the encoders read, or of a caller that has encoders what these gave; on the device."""
        model, device = self.model, self.backend.device
        if isinstance(image, ImageConditioning):
            if settings.fit != "stretch":
                raise SettingsError(
                    "fit",
                    expected="its default beside an ImageConditioning, which leaves it without effect",
                    got=settings.fit,
                    remedy="Leave it out.",
                )
            return image.fitted(model.architecture, settings.height, settings.width, device)
        if model.orbits and not isinstance(image, Tensor):
            image = images.objects_on_white(image, max(settings.height, settings.width))
        framed = images.fitted(image, settings.height, settings.width, settings.fit)
        pixels = images.to_vae_pixels(framed, settings.height, settings.width).to(device)
        clip = images.to_clip_pixels(framed, model.architecture.clip_size, model.clip_mean, model.clip_std)
        return pipeline.ImagePixels(pixels, clip.to(device))

    def _on_step(self, callback: Callback | None, tensor_inputs: Sequence[str]) -> pipeline.StepCallback:
        """Shows each step to the caller's function, and takes what it gives back and what it changed."""

        def on_step(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            if callback is None:
                return x
            given = {"latents": x} if tensor_inputs else {}
            returned = returned_tensors(callback(self, step, timestep, given))
            self._call.refresh()
            replaced = returned.get("latents", x)
            return pipeline.latents_of("latents of callback_on_step_end", replaced, x.shape, x.device)

        return on_step

    def _plan(self, settings: Settings, videos: int) -> Plan:
        """How this call runs.  Within a budget, networks that another plan left in memory are closed."""
        if self._last_plan is None:
            self.source = self.source.planned_anew()
        plan = self.source.plan(settings, videos)
        if self.source.planner is None:
            return replace(plan, residency=type(self.residency))
        if plan.stages:
            self._say(plan, self.source.planner)
        last, self._last_plan = self._last_plan, plan
        others = (
            BACKENDS[self.choice.backend].of_bundle
            and bool(plan.stages)  # where memory was not ample
            and last is not None
            and (last.profile, last.slice_frames) != (plan.profile, plan.slice_frames)
        )
        if others or type(self.residency) is not plan.residency:
            self.residency.close()
            self.residency = plan.residency(self.backend)
        self.source.planner.keep(plan)
        self.residency.keep_to(plan.streaming)
        there, half = self.other_half, plan.other_half
        if there and half:
            if others or type(there) is not half.residency:
                there.close()
                there = self.other_half = half.residency(there.backend)
            there.keep_to(half.streaming)
        return plan

    def _say(self, plan: Plan, planner: Planner) -> None:
        for line in planner.in_words(plan):
            notices.info("%s", line)
        if not planner.fits(plan):
            notices.warning(
                "memory may run out: this is the way that takes least, and by its count it does not fit"
            )

    def _stages(
        self,
        plan: Plan,
        turn: Turn,
        short: Callable[..., Exception],
        observer: Observer,
        encoded: bool,  # leaves the encoders closed
    ) -> tuple[pipeline.Stages, pipeline.Reusing | None]:
        """The networks of one call: each looks before it runs whether the call has ended, then tells."""

        def opened(spec: NetworkSpec, there: bool = False) -> InterruptibleNetwork:
            owner, planned, planner = self.residency, plan, self.source.planner
            if there and self.other_half:
                owner = self.other_half
                if plan.other_half and planner:
                    planned, planner = plan.other_half, planner.second
            ran_out = partial(short, spec.key, device=owner.backend.device, plan=planned, planner=planner)
            return InterruptibleNetwork(owner.network(spec), turn.check, ran_out, observer)

        profile = plan.profile
        specs = specs_of(
            profile, self.model.architecture, self.source.precision, plan.slice_frames, self.source.feature
        )
        reusing = None
        if self.source.reuse is not None:
            reusing = pipeline.Reusing(opened(specs.pop(3)), ReusePolicy(self.source.reuse))
        image_encoder, vae_encoder = (None, None) if encoded else map(opened, specs[:2])
        denoiser, *decoders = map(opened, specs[2:])
        by_frames = {d.spec.inputs[0].shape[0]: d for d in decoders}
        other_half = None
        if self.other_half is not None:
            other_half = OtherHalf(opened(specs[2], there=True), self.other_half.backend.device)
        stages = pipeline.Stages(profile, image_encoder, vae_encoder, denoiser, by_frames, other_half)
        return stages, reusing

    def _report(
        self,
        stages: pipeline.Stages,
        plan: Plan,
        reusing: pipeline.Reusing | None,
        settings: Settings,
        generator: torch.Generator | list[torch.Generator] | None,
        clock: Clock,
        turn: Turn,
        total_ms: float,
    ) -> report.RunReport:
        generators = generator if isinstance(generator, list) else [generator] if generator else []
        return report.RunReport(
            model=self.model.name,
            random_weights=self.model.random_weights,
            source=self.source.name,
            weights=self.source.weights(),
            lora=list(self.source.lora),
            profile=str(stages.profile),
            settings=settings,
            seeds=[g.initial_seed() for g in generators],
            chosen_because=self.choice.reason,
            stages=_placements(stages, reusing),
            rewrites=self.source.rewrites(),
            without_rewrites=list(self.source.without_rewrites),
            swap_networks=isinstance(self.residency, Swapped),
            plan=self.source.planner.report(plan) if self.source.planner and plan.stages else None,
            stage_ms=clock.stages,
            step_ms=clock.steps,
            evaluation_ms=clock.evaluations,
            reuse=self.source.reuse,
            shallow_evaluations=reusing.shallow if reusing else [],
            exchanged_bytes=stages.other_half.exchanged_bytes if stages.other_half else 0,
            waited_ms=turn.waited_ms,
            total_ms=total_ms,
            peak_host_bytes=report.peak_host_bytes(),
            peak_device_bytes=report.peak_device_bytes(self.backend.device),
            versions=report.versions(),
        )


def _placements(
    stages: pipeline.Stages, reusing: pipeline.Reusing | None
) -> dict[str, report.StagePlacement]:
    """By network; a decoder of a further chunk size by its key."""
    placed: dict[str, report.StagePlacement] = {}
    decoders = stages.vae_decoders.values()  # the chunk size of most frames first
    shallow = [reusing.network] if reusing else []
    encoders = filter(None, (stages.image_encoder, stages.vae_encoder))
    for network in (*encoders, stages.denoiser, *shallow, *decoders):
        spec = network.spec
        name = spec.key if spec.network in placed else spec.network
        placed[name] = report.StagePlacement(**asdict(network.placement))
    if stages.other_half is not None:
        there = stages.other_half.network.placement
        placed["denoiser, unconditional half"] = report.StagePlacement(**asdict(there))
    return placed
