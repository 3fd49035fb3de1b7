"""Exact rewrites: the same function of the same weights, with fewer or better-shaped operations.

One identity a file.  Each holds in real arithmetic, so outputs differ by rounding only; a place that does
not satisfy an identity's precondition stays as it was, and the report says why.  Rewrites work in place on
diffusers' UNetSpatioTemporalConditionModel and on the decoder of its AutoencoderKLTemporalDecoder, on
weights in any floating dtype, and leave modules that torch.compile and torch.export trace whole.

This file is the list and costs no torch to import.  Nothing in this folder knows files or backends.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from svd_engine.errors import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from svd_engine.networks.rewrites._places import Report


@dataclass(frozen=True)
class Rewrite:
    """One identity: `name` is its switch, and `name` with underscores is the file that proves it."""

    name: str
    summary: str

    def apply(self, network: nn.Module) -> Report:
        """Rewrites `network` in place wherever the identity holds."""
        report: Report = import_module(f"{__name__}.{self.name.replace('-', '_')}").apply(network)
        return report


@dataclass(frozen=True)
class Applied:
    """What one rewrite did to one network; `left_alone` says "path: reason" for each place it did not."""

    name: str
    places: int
    left_alone: tuple[str, ...]


REWRITES: tuple[Rewrite, ...] = (  # in the order in which they are applied
    Rewrite("single-token-cross-attention", "attention to one token is that token's projection"),
    Rewrite("temporal-conv2d", "(3,1,1) convolutions over frames as conv2d over [B, C, F, h*w]"),
    Rewrite("resnet-blend", "the blend after a temporal resnet folded into its last convolution"),
    Rewrite("transformer-blend", "the blend after a temporal transformer as one sum"),
    Rewrite("fused-qkv", "queries, keys and values of self-attention as one product"),
    Rewrite("frames-in-place", "temporal transformers without permuted copies of their tokens"),
    Rewrite("split-geglu", "value and gate of a feed-forward as two products, without slicing copies"),
    Rewrite("timestep-projections", "the timestep projections of all resnets as one product per video"),
    Rewrite("frame-positions", "the embedding of the frame number as a table instead of a network"),
    Rewrite("phase-upsample", "nearest upsampling and a 3x3 convolution as four 2x2 convolutions"),
)


# for TensorRT's compiler, chosen by the kernels and the traffic that it makes of them (docs/tensorrt.md), and
# for ONNX Runtime on a GPU: a bundle has one file of weights for both, and holds one trace in two forms
TENSORRT_REWRITES: tuple[Rewrite, ...] = (
    *(r for r in REWRITES if r.name not in ("fused-qkv", "frames-in-place", "phase-upsample")),
    Rewrite("attention-layout", "tokens in the order in which attention reads them, without copies"),
    Rewrite("transposed-upsample", "nearest upsampling and a 3x3 convolution as one transposed convolution"),
    Rewrite("feed-forward-in-parts", "feed-forwards at the peak of memory, half of the tokens at a time"),
    Rewrite("frames-in-groups", "the VAE decoder's widest place, a few frames at a time"),
)

GRAPH_BACKENDS = ("onnxruntime", "tensorrt", "tensorrt-rtx")  # that run a bundle's graphs, or plans of them

FRAMES_APART = Rewrite("frames-apart", "the VAE decoder's work on single frames, one after the other")

# on a CPU, after the others: they fit the work to its caches and to the kernels there
TORCH_CPU_REWRITES: tuple[Rewrite, ...] = (
    FRAMES_APART,
    Rewrite("feed-forward-slices", "feed-forwards on a thousand tokens or so at a time"),
    Rewrite("linear-as-convolution", "linear layers on tokens as 1x1 convolutions"),
    Rewrite("channels-last", "a pixel's channels side by side in memory"),
)
ORT_CPU_REWRITES: tuple[Rewrite, ...] = (
    FRAMES_APART,
    Rewrite("feed-forward-convolutions", "products of feed-forwards as 1x1 convolutions"),
    Rewrite("temporal-rows", "convolutions over frames on short rows of pixels"),
    Rewrite("winograd-rows", "3x3 convolutions of many channels as four 1x3 ones of half the rows"),
)


def rewrites_for(backend: str, device: str) -> tuple[Rewrite, ...]:
    """All that are of use to a backend of the registry on "cpu" or "cuda"."""
    if device != "cpu" and backend in GRAPH_BACKENDS:
        return TENSORRT_REWRITES
    on_cpu = {"eager": TORCH_CPU_REWRITES, "onnxruntime": ORT_CPU_REWRITES}
    return (*REWRITES, *(on_cpu.get(backend, ()) if device == "cpu" else ()))


def check_names(without: Collection[str], rewrites: Sequence[Rewrite]) -> None:
    """Raises SettingsError for a name that none of `rewrites` has: leaving it out would change nothing."""
    names = [rewrite.name for rewrite in rewrites]
    unknown = sorted(set(without) - set(names))
    if unknown:
        raise SettingsError(
            f"rewrite {', '.join(unknown)}",
            expected=f"one of {', '.join(names)}",
            got="a name that no rewrite has here",
            remedy="Correct the name, or leave it out: every rewrite is on by default.",
        )


def apply_rewrites(
    module: nn.Module, without: Collection[str] = (), rewrites: Sequence[Rewrite] = REWRITES
) -> list[Applied]:
    """Applies `rewrites`, all but those named in `without`, to a UNet or a VAE, in place.

    `module` is a UNetSpatioTemporalConditionModel, an AutoencoderKLTemporalDecoder or an AutoencoderKL (whose
    encoders are not touched), in eval mode.  It is called afterwards as before.  Needs the memory of one
    layer more.
    Raises SettingsError for a name in `without` that none of `rewrites` has.
    """
    check_names(without, rewrites)
    import torch
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    vaes = (AutoencoderKL, AutoencoderKLTemporalDecoder)
    network: nn.Module = module.decoder if isinstance(module, vaes) else module
    applied = []
    with torch.no_grad():
        for rewrite in rewrites:
            if rewrite.name not in without:
                report = rewrite.apply(network)
                applied.append(Applied(rewrite.name, report.places, report.left_alone))
    network.train(network.training)  # new parts follow the whole
    return applied
