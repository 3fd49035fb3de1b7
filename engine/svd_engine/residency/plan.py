"""One way to run a call: which networks, which of them in memory when, and the memory that this takes."""

from __future__ import annotations

from dataclasses import dataclass

from svd_engine.report import PlannedStage, PlanReport, size
from svd_engine.residency.contract import Residency
from svd_engine.spec.profile import Profile


@dataclass(frozen=True)
class Plan:
    """`stages` are empty, and the rest is 0, where no budget asked for them, or memory was ample."""

    profile: Profile
    slice_frames: int | None  # that a streamed decoder holds at a time
    residency: type[Residency]
    stages: tuple[PlannedStage, ...] = ()
    cost: float = 0.0  # of time, in units that compare the plans of one call
    sure_bytes: int = 0  # of `peak_bytes`, without what kernels may take beside what is counted
    other_half: Plan | None = None  # of the second of two devices

    @property
    def peak_bytes(self) -> int:
        return max((stage.peak_bytes for stage in self.stages), default=0)

    @property
    def streamed_bytes(self) -> int:
        """Of weights, in each call of the network of which most stream; 0 where none do."""
        return max((stage.streamed_bytes for stage in self.stages), default=0)

    @property
    def streaming(self) -> dict[str, int]:
        """Bytes of weights on the device of each network whose others stream, by key."""
        return {stage.network: stage.held_bytes for stage in self.stages if stage.streamed_bytes}

    @property
    def decoding(self) -> str:
        if self.slice_frames is not None:
            return f"streamed, {self.slice_frames} frame{'s' * (self.slice_frames > 1)} at a time"
        p = self.profile
        return "whole" if p.decode_chunk == p.frames else f"chunks of {p.decode_chunk}"

    def report(self, budget_bytes: int, other_half: PlanReport | None = None) -> PlanReport:
        return PlanReport(
            residency=self.residency.name,
            guidance=self.profile.guidance,
            batch=self.profile.batch,
            decoding=self.decoding,
            budget_bytes=budget_bytes,
            peak_bytes=self.peak_bytes,
            streamed_bytes=self.streamed_bytes,
            stages=list(self.stages),
            other_half=other_half,
        )

    def __str__(self) -> str:
        streamed = ""
        if self.streamed_bytes:
            most = max(self.stages, key=lambda stage: stage.streamed_bytes).network.partition("-")[0]
            streamed = f", {size(self.streamed_bytes)} of weights streamed in each run of {most}"
        return (
            f"networks {self.residency.name}, {self.profile.guidance} guidance, batch {self.profile.batch}, "
            f"decoder {self.decoding}: at most {size(self.peak_bytes)}{streamed}"
        )
