"""The two halves of guidance on two CPU devices: in two threads, in two processes, and on one device.

    svd-bench halves

Every way makes the same latents, which is checked.  They take turns, so that a ratio is of the same rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svd_bench.documents.results import Environment, Ratio, Spread
from svd_bench.documents.strict import StrictModel
from svd_bench.documents.table import Table, milliseconds, ratio
from svd_bench.measuring.check import check_output
from svd_bench.measuring.progress import Progress
from svd_bench.measuring.timing import Lap, paired, spread
from svd_bench.subjects.cases import checkpoint_of
from svd_bench.subjects.opening import PHOTOGRAPH, SEED
from svd_bench.subjects.other_process import OtherProcess
from svd_engine.backends.registry import BACKENDS
from svd_engine.bundle.reading import Bundle
from svd_engine.engine import VideoEngine
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.residency.resident import Resident
from svd_engine.spec.profile import Profile

if TYPE_CHECKING:
    from svd_engine.report import RunReport
    from svd_engine.spec.network import Backend

THREADS, PROCESSES, IN_TURN, AT_ONCE = (
    "two threads", "two processes", "one device, in turn", "one device, at once",
)  # fmt: skip
BACKEND_NAMES = ("eager", "onnxruntime")
CPU = torch.device("cpu")
ALLOWED = 1e-4  # from one half after the other; both at once are summed in another order


class HalvesRow(StrictModel):
    """One way of one backend, on one video."""

    backend: str
    way: str
    frames: int
    height: int  # pixels
    width: int
    step_ms: Spread
    of_threads: Ratio  # of the time of two threads
    exchanged_bytes: int  # between the devices, a video
    max_abs_difference: float  # from one half after the other, relative to its largest value


class HalvesDocument(StrictModel):
    environment: Environment
    model: str
    steps: int
    threads: int  # of each half
    rows: tuple[HalvesRow, ...]


@dataclass(frozen=True)
class Video:
    """What every way makes: latents [1,F,4,h,w]."""

    frames: int
    height: int
    width: int
    steps: int

    def made(self, engine: VideoEngine) -> tuple[Tensor, RunReport]:
        from svd_engine.media.image import cover, load_image

        output = engine(
            cover(load_image(PHOTOGRAPH), self.height, self.width), self.height, self.width, self.frames,
            self.steps, generator=torch.Generator().manual_seed(SEED), output_type="latent",
        )  # fmt: skip
        assert isinstance(output.frames, Tensor)  # latents
        return output.frames, output.report


def measure_halves(
    checkpoint: str, backend: str, video: Video, threads: int, repeat: int, say: Progress
) -> Iterator[HalvesRow]:
    """A row for each way, timed in turns after one video that is not.

    threads: of each half.  Raises what opening an engine raises, and BackendError for other latents.
    """
    with limited(threads), ways_of(checkpoint, backend, video, threads) as engines:
        say(f"{backend}: first videos")
        firsts = {way: video.made(engine) for way, engine in engines.items()}
        wanted, _ = firsts[IN_TURN]
        differences = {
            way: check_output(f"{backend}, {way}", latents, wanted, ALLOWED)
            for way, (latents, _) in firsts.items()
        }
        laps: dict[str, list[Lap]] = {way: [] for way in engines}
        order = list(engines)
        for number in range(repeat):
            say(f"{backend}: round {number + 1} of {repeat}")
            first = number % len(order)
            for way in order[first:] + order[:first]:
                _, report = video.made(engines[way])
                laps[way].append(Lap(report.stage_ms["denoiser"] / video.steps))
    for way, mine in laps.items():
        yield HalvesRow(
            backend=backend, way=way, frames=video.frames, height=video.height, width=video.width,
            step_ms=spread(mine), of_threads=paired(mine, laps[THREADS]),
            exchanged_bytes=firsts[way][1].exchanged_bytes, max_abs_difference=differences[way],
        )  # fmt: skip


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """`limit`, until the end of the block."""
    import onnxruntime

    before, options = torch.get_num_threads(), onnxruntime.SessionOptions
    limit(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        onnxruntime.SessionOptions = options


def limit(threads: int) -> None:
    """To so many threads of torch, and of each session of ONNX Runtime that is opened from now on."""
    import onnxruntime

    options = onnxruntime.SessionOptions

    def few() -> Any:
        made = options()
        made.intra_op_num_threads = threads
        return made

    torch.set_num_threads(threads)
    onnxruntime.SessionOptions = few


@contextmanager
def ways_of(checkpoint: str, backend: str, video: Video, threads: int) -> Iterator[Mapping[str, VideoEngine]]:
    """An engine for each way."""
    with ExitStack() as stack:
        source = checkpoint
        if backend == "onnxruntime":
            source = stack.enter_context(tempfile.TemporaryDirectory()) + "/bundle"
            _export(checkpoint, Path(source), video)
        opened = partial(_engine, source, backend)
        two = opened(devices=("cpu", "cpu"))
        there = OtherProcess(backend, partial(open_there, source, backend, threads))
        single = two.source.profile_for
        apart, turns = opened(devices=("cpu", "cpu")), opened(device="cpu")
        apart.other_half = Resident(there)
        turns.source = replace(turns.source, profile_for=single)
        engines = {THREADS: two, PROCESSES: apart, IN_TURN: turns, AT_ONCE: opened(device="cpu")}
        for engine in engines.values():
            engine.set_progress_bar_config(disable=True)
            stack.enter_context(engine)
        yield engines


def _engine(source: str, backend: str, **where: Any) -> VideoEngine:
    if backend == "onnxruntime":
        return VideoEngine.from_bundle(source, backend=backend, memory=None, **where)
    return VideoEngine.from_checkpoint(checkpoint_of(source), backend=backend, memory=None, **where)


def open_there(source: str, backend: str, threads: int) -> Backend:
    """In the other process, which ends with it."""
    limit(threads)
    what: Bundle | Modules
    if backend == "onnxruntime":
        what = Bundle(source)
    else:
        what = Modules(checkpoint_of(source), (), rewrites_for(backend, "cpu"))
    return BACKENDS[backend].open(what, CPU, None)


def _export(checkpoint: str, folder: Path, video: Video) -> None:
    from svd_export.to_onnx import export_bundle

    size = video.frames, video.height, video.width
    profiles = [Profile(*size, guidance=guidance, decode_chunk=1) for guidance in ("batched", "single")]
    export_bundle(checkpoint_of(checkpoint), folder, profiles, torch.float32)


def halves_table(document: HalvesDocument) -> Table:
    rows = [
        [
            row.backend, f"{row.frames} x {row.height} x {row.width}", row.way,
            milliseconds(row.step_ms.median),
            ratio(row.of_threads.median, row.of_threads.low, row.of_threads.high, row.of_threads.differs),
            f"{row.exchanged_bytes:,}",
        ]
        for row in document.rows
    ]  # fmt: skip
    return Table(
        f"Two halves of guidance, {document.model}, {document.threads} CPU thread(s) each",
        ["backend", "video", "way", "a step", "over two threads", "bytes exchanged"],
        rows,
        left=3,
    )
