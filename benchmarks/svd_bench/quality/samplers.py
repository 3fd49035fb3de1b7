"""What each sampler over each schedule reaches with so many evaluations of the denoiser.

The reference is many Euler steps over Karras levels, diffusers' own sampler: where Euler goes, and not
quite where the equation does.  Each row is held against the most steps of second order too.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL.Image import Image

from svd_bench.documents.results import Environment
from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import Sampled, SamplersDocument
from svd_bench.quality.evaluate import Videos, mean
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, flow_difference, ssim, warp_error
from svd_bench.subjects.cases import checkpoint_of
from svd_engine import VideoEngine
from svd_engine.media.motion import psnr
from svd_engine.sampling.registry import SAMPLERS
from svd_engine.spec.model import Model

Choice = tuple[str, str]  # sampler, schedule

BUDGETS = (4, 8, 12, 25, 50)  # evaluations
REFERENCE: tuple[str, str, int] = ("euler", "karras", 100)  # and its steps
EXACT: tuple[str, str, int] = ("dpmpp-2m", "karras", BUDGETS[-1])
CHOICES: tuple[Choice, ...] = (
    ("euler", "karras"), ("euler", "ays"), ("heun", "karras"), ("dpmpp-2m", "karras"), ("dpmpp-2m", "ays"),
    ("lms", "karras"),
)  # fmt: skip


def most_steps(sampler: str, evaluations: int) -> int:
    """The steps to noise level 0 that so many evaluations suffice for: the last step takes one."""
    return (evaluations - 1) // SAMPLERS[sampler].evaluations + 1


@dataclass(frozen=True)
class Shape:
    """Of the videos; None takes the checkpoint's own."""

    num_frames: int | None = None
    height: int | None = None
    width: int | None = None

    def of(self, model: Model) -> tuple[int, int, int]:
        return self.num_frames or model.frames, self.height or model.height, self.width or model.width


class Samplers:
    """Videos of a checkpoint's engine by sampler, schedule and steps, held against the reference's."""

    def __init__(
        self, engine: VideoEngine, photographs: dict[str, Image], shape: tuple[int, int, int]
    ) -> None:
        self.videos, self.photographs, self.shape = Videos(engine), photographs, shape

    def clips(self, sampler: str, schedule: str, steps: int) -> list[Frames]:
        frames, height, width = self.shape
        return [
            self.videos(
                name, photograph, num_frames=frames, height=height, width=width, sampler=sampler,
                schedule=schedule, num_inference_steps=steps,
            )
            for name, photograph in self.photographs.items()
        ]  # fmt: skip

    def measured(self, sampler: str, schedule: str, steps: int) -> Sampled:
        """Means over the photographs.  Videos that are not finite raise NonFiniteOutput in the engine."""
        clips = self.clips(sampler, schedule, steps)
        pairs = list(zip(self.clips(*REFERENCE), clips, strict=True))
        exact = zip(self.clips(*EXACT), clips, strict=True)
        return Sampled(
            sampler, schedule, steps, evaluations=(steps - 1) * SAMPLERS[sampler].evaluations + 1,
            psnr=mean(psnr(*pair) for pair in pairs),
            psnr_exact=mean(psnr(*pair) for pair in exact),
            ssim=mean(ssim(*pair) for pair in pairs),
            flow=mean(flow_difference(*pair) for pair in pairs),
            warping=mean(map(warp_error, clips)),
        )  # fmt: skip


def measure_samplers(
    source: str, count: int, shape: Shape, where: Environment, progress: Progress, variant: str | None = None
) -> SamplersDocument:
    """Every choice within every budget, on the first `count` photographs."""
    checkpoint = checkpoint_of(source, variant)
    frames, height, width = shape.of(checkpoint.model)
    photographs = dict(list(held_out(height, width).items())[:count])
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32") as engine:
        samplers = Samplers(engine, photographs, (frames, height, width))
        reference = samplers.measured(*REFERENCE)
        progress(f"reference: {REFERENCE[2]} steps of {REFERENCE[0]}")
        rows = []
        for choice in CHOICES:
            rows += [samplers.measured(*choice, most_steps(choice[0], budget)) for budget in BUDGETS]
            progress(", ".join(choice))
        return SamplersDocument(
            environment=where, checkpoint=source, photographs=list(photographs), frames=frames, height=height,
            width=width, budgets=list(BUDGETS), reference=reference, rows=rows,
        )  # fmt: skip
