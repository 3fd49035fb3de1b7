"""The compiled ladder: the rewrites added one at a time, and what the compiler makes of every rung.

The sibling of `contest.ladder`, which times them.  The document is that of `svd-bench compiled`, each rung a
network of it, "KEY: + name"; the graphs are exported anew from what the bundle was made from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from svd_bench.compiled.compile_bundle import document_of
from svd_bench.compiled.compiling import CompileCase, compiled_in_child
from svd_bench.compiled.document import CompiledDocument
from svd_bench.measuring.memory import release
from svd_bench.measuring.progress import Progress
from svd_engine.bundle.manifest import NetworkEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import CheckpointError
from svd_engine.networks.modules import COMPONENT_OF, Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_export.compiled import capability
from svd_export.verify import exported_from

BARE = "no rewrites"


def compile_ladder(
    folder: Path, target: str, networks: Collection[str] | None, progress: Progress
) -> CompiledDocument:
    """Every rung of the networks of the bundle that rewrites change, from the bottom up.

    Raises as `compile_bundle`, and CheckpointError when what the bundle was made from is gone.
    """
    capability(target)
    bundle = Bundle(folder)
    checkpoint = _original(bundle)
    made = []
    for entry in bundle.entries(networks):
        bundle.graph_name(entry.spec, "tensorrt")
        for note, without in rungs(found(bundle, entry)):
            name = f"{entry.spec.key}: {note}"
            progress(f"{name}: exporting, and compiling for {target}")
            with exported(checkpoint, entry, without) as graph:
                made.append(compiled_in_child(CompileCase(network=name, graph=graph, target=target)))
    return document_of(bundle, target, made)


def _original(bundle: Bundle) -> Checkpoint:
    """What the bundle was made from.  Raises CheckpointError when it is gone."""
    try:
        return exported_from(bundle)
    except CheckpointError as error:
        raise CheckpointError(
            error.what,
            expected=f"what {bundle.folder} was exported from, whose networks are exported anew",
            got=error.got,
            remedy="Bring it back, or measure a bundle that was exported from where it lies now.",
        ) from error


def found(bundle: Bundle, entry: NetworkEntry) -> list[str]:
    """The rewrites that found a place in a network, in their order."""
    if entry.spec.network == "vae_encoder":  # the rewrites of its component are those of the decoder
        return []
    part = COMPONENT_OF[entry.spec.network]
    return [r.name for r in bundle.manifest.rewrites if r.network == part and r.places]


def rungs(names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Note and left-out rewrites of each rung; none of a network without rewrites."""
    if not names:
        return []
    added = [(f"+ {name}", tuple(names[number + 1 :])) for number, name in enumerate(names)]
    return [(BARE, tuple(names)), *added]


@contextmanager
def exported(checkpoint: Checkpoint, entry: NetworkEntry, without: Collection[str]) -> Iterator[Path]:
    """The graph for TensorRT without some rewrites, in a temporary folder as large as the weights."""
    from svd_export.to_onnx import export_network
    from svd_export.weights import WeightsFile

    modules = Modules(checkpoint, without, rewrites_for("tensorrt", "cuda"))
    with tempfile.TemporaryDirectory(prefix="svd-bench-") as name:
        folder = Path(name)
        with WeightsFile(folder / entry.weights) as weights:
            made = export_network(modules, entry.spec, weights, ["tensorrt"])
        modules.close()
        release()
        yield folder / made.graphs["tensorrt"]
