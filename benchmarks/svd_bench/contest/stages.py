"""Every stage of a video, one after the other: networks in contest, and what runs beside the networks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svd_bench.contest.contest import Bench, contest
from svd_bench.documents.results import STAGES, Row, Setting
from svd_bench.measuring.check import check_output
from svd_bench.measuring.timing import interleave, paired, spread
from svd_bench.subjects.cases import Case, Subject, checkpoint_of
from svd_bench.subjects.flop import stage_flop
from svd_bench.subjects.opening import FPS, PHOTOGRAPH
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import BackendError
from svd_engine.sampling import samplers, schedules
from svd_engine.sampling.preconditioning import c_out, c_skip, initial_scale
from svd_engine.spec.model import Model

ENCODE_ERROR = 8.0  # mean levels of 255 that H.264 may lose on a photograph that pans


def measure_stages(
    bench: Bench, subjects: Sequence[Subject], setting: Setting, stages: Sequence[str]
) -> None:
    """Puts rows of each stage into the recorder, in the order of a video."""
    checkpoint = checkpoint_of(subjects[0].checkpoint)
    for stage in (s for s in STAGES if s in stages):
        if stage == "sampler":
            sampler(bench, subjects, setting, checkpoint)
        elif stage == "video_encode":
            video_encode(bench, setting)
        else:
            networks(bench, subjects, setting, stage, checkpoint)


def networks(
    bench: Bench, subjects: Sequence[Subject], setting: Setting, stage: str, checkpoint: Checkpoint
) -> None:
    """A stage that is a network, or the whole video.

    The reference is diffusers' eager module: in float32 on the CPU; on a GPU in the dtype that is measured,
    which needs no more memory than what is measured.
    """
    cases = [Case(subject=subject, stage=stage, setting=setting) for subject in subjects]
    first = cases[0].subject
    kind = "float32" if bench.device.type == "cpu" else cases[0].dtype
    reference = None
    if (first.name, cases[0].dtype) != ("diffusers", kind):
        plain = Subject(
            name="diffusers", backend="eager", checkpoint=first.checkpoint, device=first.device, dtype=kind
        )
        reference = reference_output(bench, Case(subject=plain, stage=stage, setting=setting))
    flop = stage_flop(stage, setting, checkpoint.model.architecture, checkpoint.configs)
    first_call_warms = stage == "whole_video"
    contest(replace(bench, warmup=0) if first_call_warms else bench, cases, reference, flop)


def reference_output(bench: Bench, case: Case) -> Tensor:
    bench.say(f"{case}: reference")
    running = bench.open_case(case)
    try:
        return running().clone()
    finally:
        running.close()


def sampler(bench: Bench, subjects: Sequence[Subject], setting: Setting, checkpoint: Checkpoint) -> None:
    """The arithmetic between the network's calls, for all steps of one video; the network is a constant."""
    model, configs = checkpoint.model, checkpoint.configs
    shape = latent_shape(setting, model)
    start, v = (torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    start, v = start.to(bench.device), v.to(bench.device)
    calls: dict[str, Callable[[], Tensor]] = {"svd-engine": lambda: _ours(setting, model, start, v)}
    if any(subject.name == "diffusers" for subject in subjects):
        calls = {"diffusers": lambda: _theirs(setting, configs["scheduler"], start, v), **calls}
        difference = check_output("sampler", calls["svd-engine"](), calls["diffusers"](), 1e-4)
    bench.say(f"sampler: {bench.repeat} rounds")
    interleave(calls, 2, bench.timer)
    timed = interleave(calls, bench.repeat, bench.timer)
    theirs = timed.get("diffusers")
    for name, laps in timed.items():
        row = Row(
            subject=name, backend="torch", device=str(bench.device), dtype="float32", stage="sampler",
            setting=setting, latency_ms=spread(laps), of_diffusers=paired(laps, theirs) if theirs else None,
            max_abs_difference=difference if name == "svd-engine" and len(calls) > 1 else None,
        )  # fmt: skip
        bench.recorder.put(f"sampler, {name}", row)


def latent_shape(setting: Setting, model: Model) -> tuple[int, ...]:
    scale = model.architecture.vae_scale
    size = (setting.height // scale, setting.width // scale)
    return setting.batch, setting.frames, model.architecture.latent_channels, *size


def _ours(setting: Setting, model: Model, start: Tensor, v: Tensor) -> Tensor:
    sigmas = schedules.karras(setting.steps, model.sigma_min, model.sigma_max, model.rho)
    sigmas = sigmas.to(start.device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return v * c_out(sigma) + x * c_skip(sigma)

    return samplers.euler(denoise, start * initial_scale(sigmas), sigmas)


def _theirs(setting: Setting, config: object, start: Tensor, v: Tensor) -> Tensor:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(setting.steps, device=start.device)
    x = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        x = scheduler.step(v, timestep, x).prev_sample
    last: Tensor = x
    return last


def video_encode(bench: Bench, setting: Setting) -> None:
    """H.264 in an mp4, of a photograph that pans: noise would measure the worst case of the encoder."""
    from svd_engine.media.video import write_video

    frames = panning(setting.frames, setting.height, setting.width)
    with tempfile.TemporaryDirectory(prefix="svd-bench-") as folder:
        path = Path(folder, "video.mp4")

        def encode() -> object:
            return write_video(frames, path, FPS)

        first, _ = bench.timer.lap(encode)
        check_video(path, frames)
        bench.say(f"video_encode: {bench.repeat} rounds")
        laps = interleave({"": encode}, bench.repeat, bench.timer)[""]
    row = Row(
        subject="svd-engine", backend="libx264", device="cpu", dtype="uint8", stage="video_encode",
        setting=setting, latency_ms=spread(laps), first_call_ms=first.ms,
    )  # fmt: skip
    bench.recorder.put("video_encode", row)


def panning(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [F,H,W,3]: the photograph moves by two pixels a frame."""
    from svd_engine.media.image import cover, load_image

    still = np.asarray(cover(load_image(PHOTOGRAPH), height, width).resize((width, height)))
    return np.stack([np.roll(still, 2 * index, axis=1) for index in range(frames)])


def check_video(path: Path, frames: np.ndarray) -> None:
    """Raises BackendError unless the file decodes to these frames, but for what H.264 loses."""
    import av

    with av.open(str(path)) as file:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    same = decoded.shape == frames.shape
    lost = float(np.abs(decoded.astype(int) - frames).mean()) if same else float("inf")
    if lost > ENCODE_ERROR:
        raise BackendError(
            f"encoded video {path.name}",
            expected=f"{list(frames.shape)} within {ENCODE_ERROR} levels of 255 on average",
            got=f"{list(decoded.shape)}, {lost:.1f} levels away",
            remedy="Nothing was timed: check the installation of PyAV.",
        )
