"""What half precision costs in likeness, as the exact rewrites of its bundles are added one at a time.

A rewrite is exact in real numbers, and may round elsewhere in half precision.  Every rung is the network that
a bundle's graphs are traced from, in torch on the CPU, with a GPU's sums; the reference is diffusers' own in
float32.  ONNX Runtime would show less: on a CPU it computes in float32 and rounds between runs of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from svd_bench.compiled.ladder import rungs
from svd_bench.documents.results import Environment
from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import HalfDocument, Rounded
from svd_bench.quality.evaluate import DEFAULTS, ClipSettings, Videos
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, flow_difference, ssim
from svd_bench.quality.samplers import Shape
from svd_bench.subjects.cases import checkpoint_of
from svd_engine import VideoEngine
from svd_engine.backends.torch.eager import EagerBackend
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.media.motion import psnr
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import REWRITES, TENSORRT_REWRITES, Rewrite
from svd_engine.residency.resident import Resident

aten = torch.ops.aten


class SumsInFloat32(TorchDispatchMode):
    """Half-precision products, convolutions, attention and normalisations with sums in float32, rounded once.

    All else is torch's own, which rounds every result as well.
    """

    OPERATORS = frozenset(
        (
            aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.convolution, aten.native_layer_norm,
            aten.native_group_norm, aten._scaled_dot_product_flash_attention_for_cpu,
        )
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        half = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.float16]
        if func.overloadpacket not in self.OPERATORS or not half:
            return func(*args, **named)
        args, named = tree_map(lambda x: _cast(x, torch.float16, torch.float32), (args, named))
        return tree_map(lambda x: _cast(x, torch.float32, torch.float16), func(*args, **named))


def _cast(value: object, old: torch.dtype, new: torch.dtype) -> object:
    return value.to(new) if isinstance(value, torch.Tensor) and value.dtype == old else value


def measure_half(
    source: str, shape: Shape, where: Environment, progress: Progress, variant: str | None = None
) -> HalfDocument:
    """Every rung in float16, on the first held-out photograph."""
    checkpoint = checkpoint_of(source, variant)
    frames, height, width = shape.of(checkpoint.model)
    name, photograph = next(iter(held_out(height, width).items()))
    call: ClipSettings = {"num_frames": frames, "height": height, "width": width}
    plain = [rewrite.name for rewrite in REWRITES]
    with opened(checkpoint, "fp32", plain, REWRITES) as engine:
        reference = Videos(engine)(name, photograph, **call)
    progress("float32")
    with opened(checkpoint, "fp16", (), TENSORRT_REWRITES) as engine, SumsInFloat32():
        every = Videos(engine)(name, photograph, **call)
        places = engine.source.rewrites()
    found = {key.partition("/")[2] for key, count in places.items() if count}
    rows = []
    for rung, without in rungs([rewrite.name for rewrite in TENSORRT_REWRITES if rewrite.name in found]):
        video = every
        if without:
            with opened(checkpoint, "fp16", without, TENSORRT_REWRITES) as engine, SumsInFloat32():
                video = Videos(engine)(name, photograph, **call)
        rows.append(difference_of(rung, reference, video))
        progress(rung)
    return HalfDocument(
        environment=where, checkpoint=source, photograph=name, frames=frames, height=height, width=width,
        steps=DEFAULTS["num_inference_steps"], rows=rows,
    )  # fmt: skip


def opened(
    checkpoint: Checkpoint, dtype: str, without: Collection[str], rewrites: Sequence[Rewrite]
) -> VideoEngine:
    """An engine of eager torch on the CPU with rewrites that may not be those of this backend."""
    modules = Modules(checkpoint, without, rewrites)
    engine = VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype=dtype, memory=None)
    residency = Resident(EagerBackend(modules, torch.device("cpu")))
    return VideoEngine(replace(engine.source, residency=residency, rewrites=modules.places))


def difference_of(rung: str, reference: Frames, video: Frames) -> Rounded:
    return Rounded(
        rung,
        psnr=psnr(reference, video),
        worst_psnr=min(psnr(*pair) for pair in zip(reference, video, strict=True)),
        ssim=ssim(reference, video),
        flow=flow_difference(reference, video),
    )
