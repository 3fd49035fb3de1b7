"""The compiled ladder: the rewrites added one at a time, and what the compiler makes of every rung.

The sibling of `contest.ladder`, which times them.  The document is that of `svd-bench compiled`, each rung a
network of it, "KEY: + name"; the graphs are exported anew from what the bundle was made from.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from svd_bench.compiled.compile_bundle import document_of
from svd_bench.compiled.compiling import CompileCase, compiled_in_child
from svd_bench.compiled.document import CompiledDocument, CompiledNetwork, read_compiled
from svd_bench.measuring.environment import DIRTY
from svd_bench.measuring.memory import release
from svd_bench.measuring.progress import Progress
from svd_engine.bundle.manifest import NetworkEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.cli import console
from svd_engine.errors import CheckpointError, SettingsError
from svd_engine.networks.modules import COMPONENT_OF, Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_export.compiled import capability
from svd_export.verify import exported_from

BARE = "no rewrites"


def compile_ladder(
    folder: Path, target: str, networks: Collection[str] | None, progress: Progress, path: Path | None = None
) -> CompiledDocument:
    """Every rung of the networks of the bundle that rewrites change, from the bottom up.

    path: file of the document, written after each rung; those that it holds are kept, see `done_before`.
    Raises as `compile_bundle`, CheckpointError when what the bundle was made from is gone, and OutputError.
    """
    capability(target)
    bundle = Bundle(folder)
    checkpoint = _original(bundle)
    wanted = []
    for entry in bundle.entries(networks):
        bundle.graph_name(entry.spec, "tensorrt")
        for note, without in rungs(found(bundle, entry)):
            wanted.append((f"{entry.spec.key}: {note}", entry, without))
    document = document_of(bundle, target, ())
    made = done_before(path, document, [name for name, *_ in wanted])
    if made:
        progress(f"{len(made)} of {len(wanted)} rungs were compiled before")
    for name, entry, without in wanted[len(made) :]:
        progress(f"{name}: exporting, and compiling for {target}")
        with exported(checkpoint, entry, without) as graph:
            made = (*made, compiled_in_child(CompileCase(network=name, graph=graph, target=target)))
        if path is not None:
            console.write_text(path, f"{with_networks(document, made).model_dump_json()}\n")
    return with_networks(document, made)


def done_before(
    path: Path | None, now: CompiledDocument, names: Sequence[str]
) -> tuple[CompiledNetwork, ...]:
    """The first of the rungs `names` that the file holds, when the same command wrote it with the same code.

    None where the code cannot be told to be the same, in a checkout with changes; none of a damaged file.
    """
    if path is None or not path.is_file() or now.environment.commit.endswith(DIRTY):
        return ()
    with suppress(SettingsError):
        before = read_compiled(path)
        kept = [rung.network for rung in before.networks]
        if origin(before) == origin(now) and kept == list(names[: len(kept)]):
            return before.networks
    return ()


def origin(document: CompiledDocument) -> tuple[object, ...]:
    """What decides the figures of a rung, but for its rewrites."""
    where = document.environment
    code = (where.command, where.commit, where.versions)
    return (*code, document.compiler, document.target, document.model, document.dtype)


def with_networks(document: CompiledDocument, networks: Sequence[CompiledNetwork]) -> CompiledDocument:
    return document.model_copy(update={"networks": tuple(networks)})


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
