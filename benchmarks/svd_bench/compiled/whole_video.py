"""The networks of one video in a document of `svd-bench compiled`, as what a prediction needs of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import svd_bench
from svd_bench.cards.predict import CompiledVideo, Kernels, Stage
from svd_bench.cards.published import Part
from svd_bench.compiled.document import CompiledDocument, CompiledNetwork, KernelGroup, read_compiled
from svd_engine.errors import SettingsError
from svd_export.kernel_arithmetic import CONVOLUTION, FUSED_ATTENTION, PRODUCTS

DOCUMENTS = Path(svd_bench.__file__).parent / "results" / "compiled"
MULTIPLY = (CONVOLUTION, *PRODUCTS)  # kinds of kernels
COUNTED = 0.98  # share of a graph's operations that its kernels must show

_DENOISER = re.compile(r"denoiser-b1-f(\d+)-(\d+)x(\d+)-(batched|single)")
_DECODER = re.compile(r"vae_decoder-t(\d+)-(\d+)x(\d+)")


def committed() -> list[CompiledDocument]:
    """The documents that svd_bench brings with it: real architectures, random weights."""
    return [read_compiled(path) for path in sorted(DOCUMENTS.glob("svd*.json"))]


def committed_streamed() -> list[CompiledDocument]:
    """Those of decoders that are streamed, as the documents of `committed` have them whole."""
    return [read_compiled(path) for path in sorted(DOCUMENTS.glob("streamed-svd*.json"))]


def committed_videos(guidance: bool = True) -> list[CompiledVideo]:
    return [whole_video(document, guidance) for document in committed()]


def whole_video(document: CompiledDocument, guidance: bool = True) -> CompiledVideo:
    """Batch 1, with guidance in one call of the denoiser where a document has both ways.

    Without guidance a step is one call of the denoiser of single guidance, as few-step models take it.

    Frames are decoded in its largest chunk, of which a shorter last one takes its share.  Raises
    SettingsError when a network is missing, or kernels do not show the operations of their graph.
    """
    keys = {network.network: network for network in document.networks}
    denoisers = {found[4]: found for found in map(_DENOISER.fullmatch, keys) if found}
    denoiser = denoisers.get("single")
    if guidance:
        denoiser = denoisers.get("batched") or denoiser
    if denoiser is None:
        raise _incomplete(keys, f"a denoiser of batch 1{'' if guidance else ', single guidance'}")
    frames, *sides = (int(denoiser[i]) for i in (1, 2, 3))
    height, width = sides
    chunks = {
        int(found[1]): keys[found[0]]
        for found in map(_DECODER.fullmatch, keys)
        if found and (int(found[2]), int(found[3])) == (height, width)
    }
    encoders = [keys.get("image_encoder-b1"), keys.get(f"vae_encoder-b1-{height}x{width}")]
    if not chunks or None in encoders:
        raise _incomplete(keys, f"all four networks at {height}x{width}, batch 1")
    chunk = max(chunks)
    halves = 2 if guidance and denoiser[4] == "single" else 1
    networks = [network for network in encoders if network]
    stages = (
        *(_stage("encoders", network) for network in networks),
        _stage("denoiser", keys[denoiser[0]], halves, each_step=True),
        _stage("vae_decoder", chunks[chunk], frames / chunk),
    )
    used = [*networks, keys[denoiser[0]], chunks[chunk]]
    return CompiledVideo(
        document.model, frames, height, width, document.target, document.compiler, stages,
        by_kernel=all(network.work for network in used), guidance=guidance,
    )  # fmt: skip


def _stage(part: Part, network: CompiledNetwork, calls: float = 1.0, each_step: bool = False) -> Stage:
    return Stage(part, _kernels(network) if network.work else _groups(network), calls, each_step)


def _kernels(network: CompiledNetwork) -> tuple[Kernels, ...]:
    shown = sum(row.kernels * row.flop for row in network.work)
    if shown < COUNTED * network.flop:
        raise SettingsError(
            f"kernels of {network.network}",
            expected=f"the {network.flop:.4g} FLOP of its graph",
            got=f"{shown:.4g}",
            remedy="Report this with the version of TensorRT for RTX: it logs kernels in another way.",
        )
    return tuple(
        Kernels(row.kernels, row.kernels * row.bytes, row.kernels * row.flop, row.float32)
        for row in network.work
    )


def _groups(network: CompiledNetwork) -> tuple[Kernels, ...]:
    """Kernels that multiply, and all others: the larger of two sums is never more than the sum of the larger.

    Fused attention is one of the generated kernels, and stands among the names where it moves enough; else
    all generated kernels count as if they multiplied.
    """
    attention = [group for name, group in network.names.items() if FUSED_ATTENTION in name]
    if network.fused_attentions and not attention:
        attention = [group for kind, group in network.kinds.items() if kind not in MULTIPLY]
    products = _sum([*(group for kind, group in network.kinds.items() if kind in MULTIPLY), *attention])
    whole = _sum(network.kinds.values())
    float32 = network.network.startswith("vae_encoder")  # in every precision of a bundle
    return (
        Kernels(products.count, products.bytes, network.flop, float32),
        Kernels(whole.count - products.count, whole.bytes - products.bytes, 0.0),
    )


def _sum(groups: Iterable[KernelGroup]) -> Kernels:
    held = list(groups)
    return Kernels(sum(g.kernels for g in held), sum(g.read_bytes + g.written_bytes for g in held), 0.0)


def _incomplete(keys: Iterable[str], expected: str) -> SettingsError:
    return SettingsError(
        "compiled networks",
        expected=expected,
        got=", ".join(keys) or "none",
        remedy="Compile a whole bundle with `svd-bench compiled BUNDLE --out FOLDER`, without --network.",
    )
