"""What each sampler over each schedule reaches with so many evaluations of the denoiser.

The reference is many Euler steps over Karras levels, diffusers' own sampler: where Euler goes, and not
quite where the equation does.  Each row is held against as many steps of second order too.
"""

from __future__ import annotations

from PIL.Image import Image

from svd_bench.documents.results import Environment
from svd_bench.measuring.progress import Progress
from svd_bench.quality.document import Sampled, SamplersDocument
from svd_bench.quality.evaluate import Videos, mean
from svd_bench.quality.held_out import held_out
from svd_bench.quality.metrics import Frames, flow_difference, psnr, ssim, warp_error
from svd_engine import VideoEngine
from svd_engine.checkpoint.opening import open_checkpoint
from svd_engine.sampling.registry import SAMPLERS

Choice = tuple[str, str]  # sampler, schedule

REFERENCE: tuple[str, str, int] = ("euler", "karras", 100)  # and its steps
EXACT: tuple[str, str, int] = ("dpmpp-2m", "karras", 100)
BUDGETS = (4, 8, 12, 25, 50)  # evaluations
CHOICES: tuple[Choice, ...] = (
    ("euler", "karras"), ("euler", "exponential"), ("euler", "ays"), ("heun", "karras"),
    ("dpmpp-2m", "karras"), ("dpmpp-2m", "ays"), ("lms", "karras"),
)  # fmt: skip
FRAMES = 8  # of a video at most: enough to see it move


def most_steps(sampler: str, evaluations: int) -> int:
    """The steps to noise level 0 that so many evaluations suffice for: the last step takes one."""
    return (evaluations - 1) // SAMPLERS[sampler].evaluations + 1


class Samplers:
    """Videos of a checkpoint's engine by sampler, schedule and steps, held against the reference's."""

    def __init__(self, engine: VideoEngine, photographs: dict[str, Image]) -> None:
        self.videos, self.photographs = Videos(engine), photographs
        self.frames = min(FRAMES, engine.default.frames)

    def clips(self, sampler: str, schedule: str, steps: int) -> list[Frames]:
        return [
            self.videos(
                name, photograph, num_frames=self.frames, sampler=sampler, schedule=schedule,
                num_inference_steps=steps,
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
    source: str, count: int, where: Environment, progress: Progress, variant: str | None = None
) -> SamplersDocument:
    """Every choice within every budget, on the first `count` photographs."""
    checkpoint = open_checkpoint(source, variant)
    model = checkpoint.model
    photographs = dict(list(held_out(model.height, model.width).items())[:count])
    with VideoEngine.from_checkpoint(checkpoint, backend="eager", device="cpu", dtype="fp32") as engine:
        samplers = Samplers(engine, photographs)
        reference = samplers.measured(*REFERENCE)
        progress(f"reference: {REFERENCE[2]} steps of {REFERENCE[0]}")
        rows = []
        for choice in CHOICES:
            rows += [samplers.measured(*choice, most_steps(choice[0], budget)) for budget in BUDGETS]
            progress(", ".join(choice))
        return SamplersDocument(
            environment=where, checkpoint=source, photographs=list(photographs), frames=samplers.frames,
            height=model.height, width=model.width, budgets=list(BUDGETS), reference=reference,
            exact=samplers.measured(*EXACT), rows=rows,
        )  # fmt: skip
