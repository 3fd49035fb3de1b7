"""What half precision costs in likeness, as the exact rewrites of its bundles are added one at a time.

A rewrite is exact in real numbers, and may round elsewhere in half precision.  Every rung is a bundle of its
own in ONNX Runtime, held against the checkpoint in float32 in eager torch, both on the CPU.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from svd_bench.compiled.ladder import rungs
from svd_bench.documents.results import Environment
from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import HalfDocument, Rounded
from svd_bench.quality.evaluate import DEFAULTS, ClipSettings, Videos, bundled
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, flow_difference, ssim
from svd_bench.quality.samplers import Shape
from svd_bench.subjects.cases import checkpoint_of
from svd_engine import VideoEngine
from svd_engine.media.motion import psnr
from svd_engine.networks.rewrites import TENSORRT_REWRITES
from svd_engine.spec.profile import Profile


def measure_half(
    source: str, shape: Shape, where: Environment, progress: Progress, variant: str | None = None
) -> HalfDocument:
    """Every rung in float16, on the first held-out photograph."""
    checkpoint = checkpoint_of(source, variant)
    frames, height, width = shape.of(checkpoint.model)
    profile = Profile(frames, height, width, decode_chunk=frames)
    name, photograph = next(iter(held_out(height, width).items()))
    call: ClipSettings = {"num_frames": frames, "height": height, "width": width}

    def rounded(without: Collection[str]) -> tuple[Frames, list[str]]:
        """The video, and the rewrites that found a place, in their order."""
        with bundled(checkpoint, profile, torch.float16, without) as engine:
            places = engine.source.rewrites()
            found = {key.partition("/")[2] for key, count in places.items() if count}
            video = Videos(engine)(name, photograph, **call)
            return video, [r.name for r in TENSORRT_REWRITES if r.name in found]

    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32") as engine:
        reference = Videos(engine)(name, photograph, **call)
    progress("float32")
    every, found = rounded(())
    rows = []
    for rung, without in rungs(found):
        video = rounded(without)[0] if without else every
        rows.append(difference_of(rung, reference, video))
        progress(rung)
    return HalfDocument(
        environment=where, checkpoint=source, photograph=name, frames=frames, height=height, width=width,
        steps=DEFAULTS["num_inference_steps"], rows=rows,
    )  # fmt: skip


def difference_of(rung: str, reference: Frames, video: Frames) -> Rounded:
    return Rounded(
        rung,
        psnr=psnr(reference, video),
        worst_psnr=min(psnr(*pair) for pair in zip(reference, video, strict=True)),
        ssim=ssim(reference, video),
        flow=flow_difference(reference, video),
    )
