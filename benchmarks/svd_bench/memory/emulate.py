"""Emulates smaller memory tiers on a large GPU: which settings fit, at what peak and latency on this GPU.

One subprocess an attempt, so that no attempt leaves memory behind.  Not every combination is tried: from
the largest decode chunk down, until one fits (a smaller one then does too) or until the denoiser does not
(no chunk helps that); and with networks swapped only where not everything fits with all of them resident.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from svd_bench.cards.cards import TIERS, Tier
from svd_bench.documents.results import OutOfMemory
from svd_bench.documents.table import GIB, Table, gibibytes, milliseconds
from svd_bench.measuring.children import in_utf8
from svd_bench.memory.capped import Answer, Attempt, Networks
from svd_engine.errors import BackendUnavailable, SettingsError
from svd_engine.spec.profile import GuidanceMode

if TYPE_CHECKING:
    from svd_bench.documents.recorder import Recorder
    from svd_engine.spec.model import Model

CUDA_CONTEXT = GIB // 2  # bytes that a CUDA context and its libraries hold outside torch, on a real card too
TORCH_BACKENDS = ("eager", "compiled")
CHUNKS = (8, 4, 2, 1)  # decode chunks tried after all frames at once

Runner = Callable[[Attempt], Answer]


@dataclass(frozen=True)
class TierResult:
    tier: Tier
    attempt: Attempt
    answer: Answer

    def __str__(self) -> str:
        a = self.attempt
        return (
            f"{self.tier.name} GB, {a.backend}, {a.frames} frames, {a.guidance} guidance, "
            f"decode chunk {a.decode_chunk}, networks {a.networks}: {self.verdict}"
        )

    @property
    def verdict(self) -> str:
        if self.answer.failed:
            return f"failed: {self.answer.failed}"
        return "fits" if self.answer.fits else f"does not fit ({self.answer.stopped_in})"


def device_memory(device: str) -> int:
    """Bytes of the GPU.  Raises BackendUnavailable where there is none, SettingsError for a wrong name."""
    import torch

    from svd_engine.backends.choose import resolve

    if not torch.cuda.is_available() or resolve(device).type != "cuda":
        raise BackendUnavailable(
            f"emulated memory tiers on device {device}",
            expected="a CUDA GPU: the cap is one of torch's CUDA allocator",
            got=f"{torch.cuda.device_count()} GPUs visible to torch {torch.__version__}",
            remedy="Run this on a GPU machine; without --run the tiers and predictions need none.",
        )
    return int(torch.cuda.get_device_properties(resolve(device)).total_memory)


def smaller_tiers(memory: int, names: Sequence[str] = ()) -> list[Tier]:
    """The tiers that a GPU of `memory` bytes can emulate; of those the named ones."""
    possible = [tier for tier in TIERS if tier.gigabytes * GIB < memory]
    chosen = [tier for tier in possible if not names or tier.name in names]
    missing = set(names) - {tier.name for tier in chosen}
    if missing or not chosen:
        raise SettingsError(
            "tiers",
            expected=f"of {', '.join(t.name for t in possible) or 'none'}, below {memory / GIB:.1f} GiB",
            got=", ".join(sorted(missing)) or "none smaller than this GPU",
            remedy="Choose smaller tiers, or run on a larger GPU.",
        )
    return chosen


def torch_backends(names: Sequence[str]) -> Sequence[str]:
    """Those named, or all whose memory torch's allocator holds.  Raises SettingsError for another."""
    for name in names:
        if name not in TORCH_BACKENDS:
            raise SettingsError(
                "--backends",
                expected=f"of {', '.join(TORCH_BACKENDS)}, whose memory torch's allocator holds",
                got=repr(name),
                remedy="A cap does not bind other backends; measure them on a card of that size.",
            )
    return names or TORCH_BACKENDS


def base_attempt(
    checkpoint: str, device: str, model: Model, steps: int, repeat: int, variant: str | None = None
) -> Attempt:
    """At the model's own size; tier, backend, frames, guidance, networks and chunk are for `try_tiers`."""
    return Attempt(
        checkpoint=checkpoint, variant=variant, backend="eager", device=device, cap=None, note="",
        frames=model.frames, height=model.height, width=model.width,
        guidance="batched", networks="resident", decode_chunk=model.frames, steps=steps, repeat=repeat,
    )  # fmt: skip


def try_tiers(
    base: Attempt, tiers: Sequence[Tier], backends: Sequence[str], frames: Sequence[int], run: Runner
) -> Iterator[TierResult]:
    """Every tier, backend, frame count and guidance mode; chunks and swapping until the answer is known."""
    for tier in tiers:
        cap = {"cap": tier.gigabytes * GIB - CUDA_CONTEXT, "note": f"emulated cap {tier.gigabytes} GB"}
        for backend in backends:
            for count in frames:
                for guidance in get_args(GuidanceMode):
                    fixed = cap | {"backend": backend, "frames": count, "guidance": guidance}
                    yield from _swap_if_needed(base.model_copy(update=fixed), tier, run)


def _swap_if_needed(base: Attempt, tier: Tier, run: Runner) -> Iterator[TierResult]:
    for networks in get_args(Networks):
        for chunk in (base.frames, *(c for c in CHUNKS if c < base.frames)):
            one = base.model_copy(update={"networks": networks, "decode_chunk": chunk})
            answer = run(one)
            yield TierResult(tier, one, answer)
            if answer.failed or (answer.fits and chunk == base.frames):
                return
            if answer.fits or answer.stopped_in == "denoiser":
                break


def in_subprocess(attempt: Attempt) -> Answer:
    command = [sys.executable, "-m", "svd_bench.memory.capped", attempt.model_dump_json()]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=in_utf8(), check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        why = done.stderr.strip().splitlines() or ["no message"]
        return Answer(failed=f"exit code {done.returncode}: {why[-1]}")
    return Answer.model_validate_json(lines[-1])


def record_result(recorder: Recorder, tried: TierResult, model: Model) -> None:
    """A row when it fits, a misfit when it does not, a warning when something else went wrong."""
    attempt, answer = tried.attempt, tried.answer
    if answer.row is not None:
        recorder.put(str(tried), answer.row)
    elif answer.failed:
        recorder.warn(f"emulated cap {tried}")
    else:
        setting = attempt.setting(model.name, model.random_weights)
        recorder.put_out_of_memory(
            OutOfMemory(
                backend=attempt.backend, setting=setting, note=attempt.note, stopped_in=answer.stopped_in
            )
        )


def tiers_table(tried: Sequence[TierResult], device: str) -> Table:
    rows = []
    for one in tried:
        a, video = one.attempt, one.answer.row
        rows.append(
            [
                f"{one.tier.name} GB", a.backend, a.guidance, a.networks, one.verdict,
                str(a.frames), str(a.decode_chunk),
                gibibytes(video.peak_torch_bytes if video else None),
                milliseconds(video.latency_ms.median if video else None),
            ]
        )  # fmt: skip
    return Table(
        f"What fits under an emulated cap, on {device}",
        [
            "emulated cap", "backend", "guidance", "networks", "", "frames", "decode chunk", "peak (torch)",
            "a video, here",
        ],
        rows,
        left=5,
        note="Latency is this GPU's, not a small card's.  Where one fits, smaller decode chunks fit too, and "
        "so do swapped networks.",
    )  # fmt: skip
