"""What a checkpoint's videos are worth, on photographs it never saw, and what each inexact setting costs.

Every figure is a mean over the held-out photographs unless its name says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from PIL.Image import Image

from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import BUCKETS, Difference, Metric, Motion
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, contrast_kept, flow_difference, ssim, warp_error
from svd_bench.subjects.cases import checkpoint_of
from svd_bench.subjects.opening import DIFFUSERS_GUIDANCE
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.media.image import to_vae_pixels
from svd_engine.media.motion import optical_flow, psnr, speeds
from svd_engine.spec.profile import Profile

STEPS = (5, 25, 50)
STITCHED = 6  # frames of the video that is put together from frames of one video each: the last ones


class ClipSettings(TypedDict, total=False):
    """Arguments of a call that differ between clips."""

    motion_bucket_id: int
    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    sampler: str
    schedule: str
    decode_chunk_size: int
    min_guidance_scale: float
    max_guidance_scale: float


DEFAULTS: ClipSettings = {
    "motion_bucket_id": 127,
    "num_inference_steps": 25,
    "min_guidance_scale": DIFFUSERS_GUIDANCE["min_guidance_scale"],
    "max_guidance_scale": DIFFUSERS_GUIDANCE["max_guidance_scale"],
}


class Videos:
    """Clips of one engine, on the CPU, made once each."""

    def __init__(self, engine: VideoEngine) -> None:
        self.engine = engine
        engine.set_progress_bar_config(disable=True)
        self._made: dict[tuple[object, ...], tuple[Frames, float]] = {}

    def __call__(self, name: str, image: Image, seed: int = 0, **settings: Unpack[ClipSettings]) -> Frames:
        return self.timed(name, image, seed, **settings)[0]

    def timed(
        self, name: str, image: Image, seed: int = 0, **settings: Unpack[ClipSettings]
    ) -> tuple[Frames, float]:
        """(frames, seconds) of the photograph `name`, at diffusers' guidance unless another is named."""
        asked: ClipSettings = {**DEFAULTS, **settings}
        key = (name, seed, *sorted(asked.items()))
        if key not in self._made:
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            frames = self.engine(image, generator=generator, output_type="np", **asked).frames[0]
            assert isinstance(frames, np.ndarray)  # output_type "np"
            self._made[key] = frames, time.perf_counter() - started
        return self._made[key]


def reconstructions(
    checkpoint: Checkpoint, photographs: dict[str, Image]
) -> dict[str, tuple[Frames, Frames]]:
    """Each photograph at the model's size, and what the autoencoder makes of it: [1, H, W, 3] each."""
    vae: Any = checkpoint.load("vae", torch.float32)
    model = checkpoint.model
    pairs = {}
    for name, image in photographs.items():
        pixels = to_vae_pixels(image, model.height, model.width)
        with torch.no_grad():
            latent = vae.encode(pixels).latent_dist.mode()
            decoded = vae.decode(latent, num_frames=1).sample.clamp(-1, 1)
        pairs[name] = (_frames(pixels), _frames(decoded))
    return pairs


def targets(checkpoint: Checkpoint, count: int, progress: Progress) -> tuple[list[Metric], list[Motion]]:
    """What the demo checkpoint is held to, and how each video moves; of the first `count` photographs."""
    photographs = held_out(checkpoint.model.height, checkpoint.model.width)
    pairs = reconstructions(checkpoint, photographs)
    figures = list(of_autoencoder(pairs))
    photographs = dict(list(photographs.items())[:count])
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32") as engine:
        videos = Videos(engine)
        motions = []
        for bucket in BUCKETS:
            motions += [motion(videos, name, p, bucket) for name, p in photographs.items()]
            progress(f"{len(photographs)} videos at motion bucket {bucket}")
        middle = [videos(name, photograph) for name, photograph in photographs.items()]
        firsts = [psnr(clip[:1], pairs[name][1]) for name, clip in zip(photographs, middle, strict=True)]
        figures += [
            Metric("first frame against the reconstruction: PSNR, dB", mean(firsts), 22),
            Metric("contrast of the last frame over the first, least", min(map(contrast_kept, middle)), 0.7),
            *of_motions(motions),
            *of_one(videos, *next(iter(photographs.items())), progress),
        ]
    return figures, motions


def of_autoencoder(pairs: dict[str, tuple[Frames, Frames]]) -> Iterator[Metric]:
    scores = {name: psnr(*pair) for name, pair in pairs.items()}
    yield Metric("autoencoder: PSNR of reconstruction, dB", mean(scores.values()), 23)
    for name, score in scores.items():
        yield Metric(f"  {name}", score)


def motion(videos: Videos, name: str, photograph: Image, bucket: int) -> Motion:
    moves = speeds(optical_flow(videos(name, photograph, motion_bucket_id=bucket)))
    return Motion(name, bucket, float(moves.mean()), float(moves.max() / np.median(moves)))


def of_motions(motions: list[Motion]) -> Iterator[Metric]:
    low, mid, high = (mean(m.flow for m in motions if m.bucket == bucket) for bucket in BUCKETS)
    yield Metric("optical flow, bucket 127 over 20", mid / low, 1)
    yield Metric("optical flow, bucket 220 over 127", high / mid, 1)
    yield Metric("optical flow, bucket 220 over 20", high / low, 1.5)
    yield Metric("a frame's flow over its clip's median, largest", max(m.jump for m in motions), 3, "less")


def of_one(videos: Videos, name: str, photograph: Image, progress: Progress) -> Iterator[Metric]:
    """What needs several videos of one photograph."""
    seeds = [videos(name, photograph, seed) for seed in range(STITCHED)]
    single = np.stack([clip[i - STITCHED] for i, clip in enumerate(seeds)])
    progress("frames generated one by one")
    ratio = warp_error(seeds[0][-STITCHED:]) / warp_error(single)
    yield Metric("unexplained change, video over frames of one video each", ratio, 1, "less")
    yield Metric("two seeds: optical flow difference, pixels a frame", flow_difference(*seeds[:2]), 0.1)
    by_steps = [videos(name, photograph, num_inference_steps=steps) for steps in STEPS]
    progress(f"{STEPS} steps")
    near, far = psnr(by_steps[1], by_steps[2]), psnr(by_steps[0], by_steps[2])
    yield Metric("50 steps: PSNR of 25 less that of 5, dB", near - far, 0)


def differences(checkpoint: Checkpoint, progress: Progress) -> Iterator[Difference]:
    """Each setting that is not exact, beside its time, on one photograph at the model's own size."""
    model = checkpoint.model
    name, photograph = next(iter(held_out(model.height, model.width).items()))
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32") as engine:
        warm(engine, photograph)
        videos = Videos(engine)
        reference, seconds = videos.timed(name, photograph)
        yield Difference("float32, eager, 25 steps, decoded whole", float("inf"), 1.0, 0.0, seconds)
        settings: dict[str, ClipSettings] = {
            "decode chunk 4": {"decode_chunk_size": 4},
            "decode chunk 1": {"decode_chunk_size": 1},
            **{f"{n} steps": {"num_inference_steps": n} for n in (15, 10, 5)},
            "without guidance": {"max_guidance_scale": 1.0},
        }
        for setting, changed in settings.items():
            yield difference_from(setting, reference, *videos.timed(name, photograph, **changed))
            progress(setting)
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="bf16") as engine:
        warm(engine, photograph)
        yield difference_from("bfloat16", reference, *Videos(engine).timed(name, photograph))
        progress("bfloat16")
    for dtype in (torch.float32, torch.float16):  # eager float16 takes minutes a step on a CPU
        with TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle"
            export(checkpoint, bundle, dtype)
            with VideoEngine.from_bundle(bundle, backend="onnxruntime", device="cpu") as engine:
                warm(engine, photograph)
                setting = f"ONNX Runtime, {str(dtype).removeprefix('torch.')}"
                yield difference_from(setting, reference, *Videos(engine).timed(name, photograph))
                progress(setting)


def difference_from(setting: str, reference: Frames, frames: Frames, seconds: float) -> Difference:
    return Difference(
        setting, psnr(reference, frames), ssim(reference, frames), flow_difference(reference, frames), seconds
    )


def export(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    from svd_export.to_onnx import export_bundle

    model = checkpoint.model
    profile = Profile(model.frames, model.height, model.width, decode_chunk=model.frames)
    export_bundle(checkpoint, folder, [profile], dtype)


def warm(engine: VideoEngine, photograph: Image) -> None:
    engine(photograph, num_inference_steps=1)


def evaluate(
    source: str, count: int, progress: Progress, only: str, variant: str | None = None
) -> tuple[list[Metric], list[Motion], list[Difference]]:
    """`only`: "targets", "settings" or "all"."""
    checkpoint = checkpoint_of(source, variant)
    figures, motions = targets(checkpoint, count, progress) if only != "settings" else ([], [])
    return figures, motions, list(differences(checkpoint, progress)) if only != "targets" else []


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _frames(pixels: torch.Tensor) -> Frames:
    """[N, 3, H, W] in [-1, 1] -> [N, H, W, 3] in [0, 1]."""
    frames: Frames = (pixels / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    return frames
