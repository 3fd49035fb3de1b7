"""What a measurement is, as data: one document a run, written as JSON, read by report and compare.

Latencies are milliseconds, memory is bytes, rates are per second.  A figure that could not be measured is
None, never an estimate: predictions have a type of their own in `cards.predict`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from svd_bench.documents.strict import StrictModel
from svd_engine.errors import SettingsError

FORMAT: Literal[1] = 1
STAGES = (  # of a video, in the order in which they run, and the whole
    "image_encoder", "vae_encoder", "denoiser_step", "sampler", "vae_decoder", "video_encode", "whole_video",
)  # fmt: skip
DocumentKind = Literal["run", "ladder", "tiers", "quality", "gpu-check"]


class Spread(StrictModel):
    """Of repeated timings, warm-up left out."""

    median: float
    p10: float
    p90: float
    runs: int


class Ratio(StrictModel):
    """Time over another's time: below 1 is faster.  Of the rounds that both shared, one ratio each."""

    median: float
    low: float | None = None  # the lowest and the highest round; None where no rounds were kept
    high: float | None = None
    rounds: int | None = None

    @property
    def differs(self) -> bool | None:
        """Whether every round is on one side of 1; None where that is not known: at least two are needed."""
        if self.low is None or self.high is None or self.rounds is None or self.rounds < 2:
            return None
        return self.low > 1 or self.high < 1


class Environment(StrictModel):
    """Where and how a document was measured."""

    device: str  # "NVIDIA H200", or the CPU's model name
    device_memory: int | None  # of the GPU
    driver: str | None
    cuda: str | None
    compute_capability: str | None
    cpu: str
    cores: int  # that the process may use
    threads: int  # that torch used
    host_memory: int
    versions: dict[str, str]
    commit: str  # with "+dirty" when the tree had changes
    command: str  # as typed, without this machine's paths
    measured_at: str  # UTC, ISO 8601


class Clocks(StrictModel):
    """GPU clock and temperature around a measurement; a warning when they moved."""

    before_mhz: int
    after_mhz: int
    temperature_c: int
    throttled: bool


class Ceiling(StrictModel):
    """Rates of this machine, measured in the same run, by element type ("float32", "bfloat16", ...)."""

    matmul_flops: dict[str, float]
    conv_flops: dict[str, float]
    copy_bytes: float

    def best_rate(self, dtype: str) -> float:
        """FLOP/s: the higher of the two, because what convolves at a rate can multiply at it."""
        return max(self.matmul_flops[dtype], self.conv_flops[dtype])

    def share(self, dtype: str, flop: float | None, ms: float) -> float | None:
        """Of the best rate, that `flop` in `ms` milliseconds reaches; None without a count."""
        return None if flop is None else flop / (ms / 1e3) / self.best_rate(dtype)


class Setting(StrictModel):
    """What was asked for; rows compare only when this and the hardware agree."""

    model: str
    random_weights: bool
    frames: int
    height: int
    width: int
    batch: int = 1
    guidance: Literal["batched", "single", "none"] = "batched"  # none: one half alone
    decode_chunk: int
    steps: int
    networks: Literal["resident", "swapped"] = "resident"  # all in memory, or one at a time


class Row(StrictModel):
    """One thing measured: `stage` of `subject`, as it really ran."""

    subject: str  # "svd-engine", "diffusers", "diffusers-compile"
    backend: str
    device: str
    dtype: str
    stage: str  # of STAGES
    setting: Setting
    rewrites: tuple[str, ...] = ()  # that were on
    latency_ms: Spread
    first_call_ms: float | None = None  # load, compile, capture: everything before steady state
    flop: float | None = None  # counted, 2 per multiply-add
    share_of_ceiling: float | None = None  # flop / latency over the ceiling's rate
    peak_driver_bytes: int | None = None  # device memory in use, as NVML sees it
    peak_torch_bytes: int | None = None
    peak_host_bytes: int | None = None  # resident
    energy_j: float | None = None
    max_abs_difference: float | None = None  # from the reference, relative to its largest value
    of_diffusers: Ratio | None = None  # of the time of diffusers' eager module in the same rounds
    clocks: Clocks | None = None
    note: str = ""  # "emulated cap 12 GB"

    @field_validator("of_diffusers", mode="before")
    @classmethod
    def _without_rounds(cls, value: object) -> object:
        """Earlier documents have one number, of the medians, and no rounds to take another from."""
        return {"median": value} if isinstance(value, int | float) else value


class OutOfMemory(StrictModel):
    """A setting that a device's memory, or a cap on it, did not hold."""

    backend: str
    setting: Setting
    note: str  # "emulated cap 8 GB"
    stopped_in: str  # where the memory ran out: "denoiser", "vae_decoder"


class Outcome(StrictModel):
    """How one stage of a check ended; `why` says what stopped it, `facts` what it found besides rows."""

    stage: str
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    why: str = ""
    facts: dict[str, str] = Field(default_factory=dict)
    lines: tuple[str, ...] = ()  # a table of kernels, a traceback


class Results(StrictModel):
    """One document."""

    format: Literal[1] = FORMAT
    kind: DocumentKind
    environment: Environment
    ceiling: Ceiling | None = None
    rows: tuple[Row, ...]
    misfits: tuple[OutOfMemory, ...] = ()  # of tiers
    warnings: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()  # of gpu-check
    rehearsal: bool = False  # a gpu-check without a GPU: tiny networks, no figure says anything of one


def read_results(path: Path) -> Results:
    """Raises SettingsError for a file that is no document of this format."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        raise SettingsError(
            f"results {path}",
            expected=f"a JSON document that svd-bench wrote, format {FORMAT}",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error),
            remedy="Measure again with this version of svd-bench.",
        ) from error
