"""What `svd-bench compiled` writes and shows: each network as TensorRT's compiler made it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pydantic import ValidationError

from svd_bench.documents.results import Environment
from svd_bench.documents.strict import StrictModel
from svd_bench.documents.table import Table, figure
from svd_engine.bundle.manifest import CompiledFigures
from svd_engine.errors import SettingsError
from svd_engine.report import size
from svd_engine.spec.precision import DType


class KernelGroup(StrictModel):
    """Kernels of one kind or name, and what they move."""

    kernels: int
    read_bytes: int
    written_bytes: int


class KernelWork(StrictModel):
    """Kernels of one kind that do equally much."""

    kind: str
    kernels: int
    bytes: int  # that each of them reads and writes, weights included
    flop: int  # of each: convolution, products or attention, padding included
    float32: bool  # these are float32 ones


class CompiledNetwork(StrictModel):
    """One call of one network."""

    network: str  # key
    figures: CompiledFigures
    flop: float  # of products and convolutions, 2 per multiply-add
    attentions: int  # layers
    fused_attentions: int  # of these, one kernel each that never writes the scores
    kinds: dict[str, KernelGroup]  # largest first
    names: dict[str, KernelGroup]  # the largest, numbers left out of a kernel's name
    seconds: float  # that compiling took
    peak_host_bytes: int  # of the compiling process
    work: tuple[KernelWork, ...] = ()  # all kernels, largest first; documents of older versions have none


class CompiledDocument(StrictModel):
    environment: Environment
    compiler: str  # "TensorRT for RTX 1.7.1.116"
    target: str  # "sm89"
    model: str
    random_weights: bool
    dtype: DType
    networks: tuple[CompiledNetwork, ...]


def read_compiled(path: Path) -> CompiledDocument:
    """Raises SettingsError for a file that is no document of `svd-bench compiled`."""
    try:
        return CompiledDocument.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        raise SettingsError(
            f"document {path}",
            expected="a JSON document that `svd-bench compiled` wrote, or a bundle",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error),
            remedy="Compile again with this version of svd-bench.",
        ) from error


def compiled_tables(document: CompiledDocument) -> list[Table]:
    """The overview, and what moves most in each network."""
    return [networks_table(document), *(_largest(network) for network in document.networks)]


def networks_table(document: CompiledDocument) -> Table:
    weights = ", random weights" if document.random_weights else ""
    rows = [
        [
            n.network,
            f"{n.figures.kernels:,}",
            size(n.figures.read_bytes),
            size(n.figures.written_bytes),
            figure(n.flop / 1e12),
            f"{n.fused_attentions} of {n.attentions}",
            size(n.figures.activation_bytes),
            size(n.figures.weights_bytes),
            f"{n.seconds:.0f} s",
            size(n.peak_host_bytes),
        ]
        for n in document.networks
    ]
    return Table(
        f"{document.model}{weights}, {document.dtype}, {document.target}, {document.compiler}: one call",
        ("network", "kernels", "read", "written", "TFLOP", "attention fused", "activations", "weights",
         "compiled in", "by a process of"),
        rows,
        note="Compiled, not run. A kernel's tensors count once, weights included.",
    )  # fmt: skip


def changes_table(old: CompiledDocument, new: CompiledDocument) -> Table:
    """Networks that both have.  Raises SettingsError when there is none."""
    before = {network.network: network for network in old.networks}
    check_common(before, [n.network for n in new.networks])
    pairs = [(before[n.network], n) for n in new.networks if n.network in before]
    rows = []
    for a, b in pairs:
        moved = [x.figures.read_bytes + x.figures.written_bytes for x in (a, b)]
        rows.append(
            [
                b.network,
                f"{a.figures.kernels:,} -> {b.figures.kernels:,}",
                f"{size(moved[0])} -> {size(moved[1])} ({moved[1] / moved[0] - 1:+.1%})",
                f"{size(a.figures.activation_bytes)} -> {size(b.figures.activation_bytes)}",
                f"{a.fused_attentions} -> {b.fused_attentions} of {b.attentions}",
            ]
        )
    return Table(
        f"Change from {_made(old)} to {_made(new)}",
        ("network", "kernels", "read and written", "activations", "attention fused"),
        rows,
    )


def check_common(before: Collection[str], after: Collection[str]) -> None:
    """Raises SettingsError when no key is in both."""
    if not set(before) & set(after):
        raise SettingsError(
            "networks to compare",
            expected=f"one of {', '.join(before)}",
            got=", ".join(after),
            remedy="Compare bundles of the same profile.",
        )


def _made(document: CompiledDocument) -> str:
    return f"{document.model} {document.dtype} {document.target}"


def _largest(network: CompiledNetwork) -> Table:
    total = network.figures.read_bytes + network.figures.written_bytes

    def rows(groups: Mapping[str, KernelGroup], what: str) -> list[list[str]]:
        return [
            [
                what,
                name,
                f"{g.kernels:,}",
                size(g.read_bytes),
                size(g.written_bytes),
                f"{(g.read_bytes + g.written_bytes) / total:.1%}",
            ]
            for name, g in groups.items()
        ]

    return Table(
        network.network,
        ("by", "kernels of", "kernels", "read", "written", "of the traffic"),
        [*rows(network.kinds, "kind"), *rows(network.names, "name")],
        left=2,
    )
