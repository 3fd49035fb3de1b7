"""Results documents made up for tests: figures that are easy to recognise, no measurement behind them."""

from __future__ import annotations

from typing import Any

from svd_bench.documents.results import (
    Ceiling,
    DocumentKind,
    Environment,
    OutOfMemory,
    Ratio,
    Results,
    Row,
    Setting,
    Spread,
)

GIB = 2**30


def environment(**changed: Any) -> Environment:
    given: dict[str, Any] = {
        "device": "NVIDIA H200",
        "device_memory": 140 * GIB,
        "driver": "570.1",
        "cuda": "12.8",
        "compute_capability": "9.0",
        "cpu": "Test CPU",
        "cores": 16,
        "threads": 16,
        "host_memory": 128 * GIB,
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
        "command": "svd-bench run --random-weights svd-xt",
        "measured_at": "2026-01-02T03:04:05+00:00",
    }
    return Environment(**given | changed)


def setting(**changed: Any) -> Setting:
    given: dict[str, Any] = {
        "model": "svd-xt",
        "random_weights": True,
        "frames": 25,
        "height": 576,
        "width": 1024,
        "decode_chunk": 25,
        "steps": 25,
    }
    return Setting(**given | changed)


def spread(median: float, share: float = 0.01, runs: int = 5) -> Spread:
    return Spread(median=median, p10=median * (1 - share), p90=median * (1 + share), runs=runs)


def row(stage: str = "whole_video", ms: float = 1000.0, **changed: Any) -> Row:
    given: dict[str, Any] = {
        "subject": "svd-engine",
        "backend": "compiled",
        "device": "cuda:0",
        "dtype": "float32" if stage == "vae_encoder" else "float16",
        "stage": stage,
        "setting": setting(),
        "latency_ms": spread(ms),
    }
    return Row(**given | changed)


def results(*rows: Row, kind: DocumentKind = "run", **changed: Any) -> Results:
    given: dict[str, Any] = {"environment": environment()}
    return Results(kind=kind, rows=rows, **given | changed)


def ratio(median: float, share: float = 0.02, rounds: int = 5) -> Ratio:
    """Of 1 it is diffusers' own, which has no rounds."""
    if median == 1:
        return Ratio(median=1.0)
    return Ratio(median=median, low=median * (1 - share), high=median * (1 + share), rounds=rounds)


STAGES = ("image_encoder", "vae_encoder", "denoiser_step", "vae_decoder", "whole_video")
MS = {  # by subject and backend, of each of STAGES
    ("diffusers", "eager"): (12, 40, 520, 1900, 15100),
    ("svd-engine", "eager"): (12, 40, 430, 1500, 12400),
    ("svd-engine", "compiled"): (9, 33, 310, 800, 8600),
}
FLOP = {"denoiser_step": 159.9e12, "vae_decoder": 173.6e12, "whole_video": 4174e12}
CEILING = Ceiling(matmul_flops={"float16": 790e12}, conv_flops={"float16": 600e12}, copy_bytes=4.3e12)


def run() -> Results:
    """A whole run on an H200: diffusers and two backends of ours."""
    rows = []
    for (subject, backend), medians in MS.items():
        for stage, ms, theirs in zip(STAGES, medians, MS["diffusers", "eager"], strict=True):
            flop = FLOP.get(stage)
            rows.append(
                row(
                    stage,
                    ms,
                    subject=subject,
                    backend=backend,
                    flop=flop,
                    share_of_ceiling=flop and flop / ms * 1e3 / 790e12,
                    peak_driver_bytes=30 * GIB,
                    peak_torch_bytes=28 * GIB,
                    first_call_ms=ms * 3,
                    of_diffusers=ratio(ms / theirs),
                )
            )
    rows.append(row("sampler", 3.5, dtype="float32", backend="eager"))
    rows.append(row("video_encode", 410, dtype="uint8", backend="libx264", device="cpu"))
    return results(*rows, ceiling=CEILING, warnings=("denoiser_step: the GPU clock moved",))


def ladder() -> Results:
    notes = ["", "+ single_token_cross_attention", "+ temporal_conv2d", "+ frames_in_place"]
    rows = []
    for stage, start in (("denoiser_step", 520), ("vae_decoder", 1900)):
        for number, note in enumerate(notes):
            rows.append(
                row(
                    stage,
                    start * 0.93**number,
                    subject="svd-engine" if note else "diffusers",
                    backend="eager",
                    note=note,
                    rewrites=tuple(notes[1 : number + 1]),
                    of_diffusers=ratio(0.93**number),
                    max_abs_difference=1.5e-4,
                )
            )
    return results(*rows, kind="ladder")


def tiers() -> Results:
    fits = (
        (12, "single", 1, 11.0),
        (16, "single", 2, 13.5),
        (24, "batched", 4, 21.0),
        (40, "batched", 14, 36.0),
    )
    rows = [
        row(
            "whole_video", 9000 - cap * 20, backend="eager", note=f"emulated cap {cap} GB",
            setting=setting(guidance=guidance, decode_chunk=chunk), peak_torch_bytes=int(peak * GIB),
        )
        for cap, guidance, chunk, peak in fits
    ]  # fmt: skip
    misfit = OutOfMemory(
        backend="eager", setting=setting(guidance="single", decode_chunk=25, networks="swapped"),
        note="emulated cap 8 GB", stopped_in="denoiser",
    )  # fmt: skip
    return results(*rows, kind="tiers", misfits=(misfit,))
