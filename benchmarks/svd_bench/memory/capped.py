"""One video under a hard cap on device memory, in a process of its own: Attempt in, Answer out, as JSON.

The cap binds torch's allocator, so only torch backends can be tried: ONNX Runtime and TensorRT allocate
outside it.  Knows nothing of tiers or of which attempts are worth making.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from svd_bench.documents.results import Row, Setting
from svd_bench.documents.strict import StrictModel
from svd_bench.measuring.timing import Lap, spread
from svd_engine.errors import BackendUnavailable
from svd_engine.spec.profile import GuidanceMode, Profile

if TYPE_CHECKING:
    from torch import Tensor

    from svd_engine.engine import VideoEngine
    from svd_engine.report import RunReport

Networks = Literal["resident", "swapped"]


class Attempt(StrictModel):
    checkpoint: str  # what `subjects.checkpoint_of` takes
    variant: str | None = None  # of its weight files
    backend: Literal["eager", "compiled"]
    device: str
    cap: int | None  # bytes that torch may reserve there; None: all there are
    note: str  # of the rows
    frames: int
    height: int  # pixels
    width: int  # pixels
    guidance: GuidanceMode
    networks: Networks
    decode_chunk: int
    steps: int
    repeat: int  # timed videos, after one that is not

    def setting(self, model: str, random_weights: bool) -> Setting:
        return Setting(
            model=model,
            random_weights=random_weights,
            frames=self.frames,
            height=self.height,
            width=self.width,
            guidance=self.guidance,
            decode_chunk=self.decode_chunk,
            steps=self.steps,
            networks=self.networks,
        )


class Answer(StrictModel):
    """A row when it fits; where the memory ran out when it does not; why, when something else went wrong."""

    row: Row | None = None
    stopped_in: Literal["", "denoiser", "vae_decoder"] = ""  # denoiser: in it, or in what comes before
    failed: str = ""

    @property
    def fits(self) -> bool:
        return self.row is not None


def open_engine(attempt: Attempt) -> VideoEngine:
    """The engine of exactly this profile; `VideoEngine.from_checkpoint` always batches guidance."""
    import torch

    from svd_bench.subjects.cases import checkpoint_of
    from svd_engine.backends.choose import resolve
    from svd_engine.engine import VideoEngine
    from svd_engine.residency import source

    if attempt.cap is not None:
        device = resolve(attempt.device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(attempt.cap / total, device)
    profile = Profile(
        attempt.frames, attempt.height, attempt.width, 1, attempt.guidance, attempt.decode_chunk
    )
    opened = source.of_checkpoint(
        checkpoint_of(attempt.checkpoint, attempt.variant), attempt.backend, attempt.device, "auto", (),
        attempt.networks == "swapped",
    )  # fmt: skip
    return VideoEngine(replace(opened, default=profile, profile_for=lambda *_: profile))


def attempt_videos(attempt: Attempt, engine: VideoEngine) -> Answer:
    """One video to warm up, then `repeat` timed ones.

    Running out of device memory is an answer; every other error is raised.
    """
    import torch

    image = torch.rand((1, 3, attempt.height, attempt.width), generator=torch.Generator().manual_seed(0))
    done = 0

    def on_step(_: object, step: int, __: object, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal done
        done = step + 1
        return tensors

    reports = []
    try:
        for _ in range(1 + attempt.repeat):
            done = 0
            result = engine(
                image, attempt.height, attempt.width, attempt.frames, attempt.steps,
                generator=torch.Generator().manual_seed(0), output_type="pt", callback_on_step_end=on_step,
            )  # fmt: skip
            reports.append(result.report)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        return Answer(stopped_in="vae_decoder" if done == attempt.steps else "denoiser")
    return Answer(row=_row(attempt, reports))


def _row(attempt: Attempt, reports: list[RunReport]) -> Row:
    first, *timed = reports
    ran = {placement.backend for placement in first.stages.values()}
    if ran != {attempt.backend}:
        raise BackendUnavailable(
            f"attempt with backend {attempt.backend}",
            expected=f"every stage on {attempt.backend}",
            got=", ".join(sorted(ran)),
            remedy="A backend that fell back is not timed: `svd-engine info` says what works here.",
        )
    where = first.stages["denoiser"]
    return Row(
        subject="svd-engine",
        backend=where.backend,
        device=where.device,
        dtype=where.dtype,
        stage="whole_video",
        setting=attempt.setting(first.model, first.random_weights),
        rewrites=tuple(sorted({key.partition("/")[2] for key, places in first.rewrites.items() if places})),
        latency_ms=spread([Lap(report.total_ms) for report in timed]),
        first_call_ms=first.total_ms,
        peak_torch_bytes=timed[-1].peak_device_bytes,
        peak_host_bytes=timed[-1].peak_host_bytes,
        note=attempt.note,
    )


def _out_of_memory(error: BaseException | None) -> bool:
    """Also as the cause of another error: a compiler may wrap it."""
    import torch

    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    attempt = Attempt.model_validate_json(sys.argv[1])
    with open_engine(attempt) as engine:
        print(attempt_videos(attempt, engine).model_dump_json())


if __name__ == "__main__":
    main()
