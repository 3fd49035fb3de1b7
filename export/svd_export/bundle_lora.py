"""A bundle takes LoRA: the denoiser's weights that it changes are replaced, graphs and plans stay.

Nothing is traced and nothing compiled.  The UNet of the bundle's checkpoint is loaded twice, rewritten as the
export had it: without LoRA and with it.  A graph holds each of its weights as it is or `turned`, so the
tensors to replace are found by their content, by whatever name a graph has them.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from torch import Tensor

from svd_engine.arguments import DTYPES
from svd_engine.bundle.external_data import read_graph
from svd_engine.bundle.manifest import Manifest, NetworkEntry, PlanEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import ExportError
from svd_engine.networks.modules import COMPONENT_OF, Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.reuse import SHALLOW
from svd_export import forms
from svd_export.manifest_file import file_entry, write_manifest
from svd_export.placing import placed
from svd_export.to_onnx import source_of
from svd_export.verify import check_exported_from

Digest = bytes  # sha256 of a tensor's bytes


@dataclass(frozen=True)
class Taken:
    """What became of a bundle that took LoRA."""

    manifest: Manifest
    replaced: int  # weights of the rewritten UNet
    left_out: tuple[PlanEntry, ...]  # plans whose weights are fixed


def take_lora(
    bundle: Bundle,
    plain: Checkpoint,
    fused: Checkpoint,
    folder: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> Taken:
    """Writes `bundle` to `folder`, which must not exist yet, with the weights of `fused` in its denoisers.

    plain: the checkpoint that the bundle was made from.  fused: the same with other LoRA.  Of plans of the
    denoisers those that were built for other weights stay, and are refitted when they are loaded.

    Raises ExportError when the place is taken or cannot be written, and where a weight that LoRA changes
    cannot be told in a graph; ParityError when `plain` is another checkpoint; CheckpointError and BundleError
    for the faults of what is read.
    """
    denoisers = [e for e in bundle.manifest.networks if COMPONENT_OF[e.spec.network] == "unet"]
    check_exported_from(bundle, plain)
    progress("checking the bundle")
    bundle.check_hashes()
    left_out = tuple(p for p in _plans(bundle.manifest, denoisers) if not p.other_weights)
    with placed(folder) as aside:
        progress("copying the bundle")
        for name in bundle.manifest.files.keys() - {plan.file for plan in left_out}:
            shutil.copyfile(bundle.folder / name, aside / name)
        weights = aside / denoisers[0].weights
        graphs = {
            name: DenoiserGraph(
                read_graph(bundle.graph(entry.spec, runtime)), weights, entry.spec.network != SHALLOW
            )
            for entry in denoisers
            for runtime, name in entry.graphs.items()
        }
        progress("loading the UNet as it was exported")
        changes = Changes(bundle.manifest, _weights(plain, bundle.manifest))
        progress("loading the UNet with LoRA")
        new = changes.to(_weights(fused, bundle.manifest), graphs)
        progress(f"replacing {len(changes.changed)} weights")
        for name, graph in graphs.items():
            if graph.replace(new):
                onnx.save(graph.model, str(aside / name))
        manifest = _manifest(bundle, fused, denoisers, left_out, aside)
        write_manifest(aside, manifest)
    return Taken(manifest, len(changes.changed), left_out)


class DenoiserGraph:
    """A denoiser's graph and the digests of what it holds, in the file of weights and in itself.

    whole: whether it holds every weight of the UNet.
    """

    def __init__(self, model: onnx.ModelProto, weights: Path, whole: bool) -> None:
        self.model, self.weights, self.whole = model, weights, whole
        outside = [ExternalDataInfo(t) for t in model.graph.initializer if uses_external_data(t)]
        with weights.open("rb") as file:
            self.outside = {info.offset or 0: _digest_at(file, info) for info in outside}
        inside = [t for t in model.graph.initializer if t.HasField("raw_data") and not uses_external_data(t)]
        self.inside = [(tensor, hashlib.sha256(tensor.raw_data).digest()) for tensor in inside]
        self.held = {*self.outside.values(), *(digest for _, digest in self.inside)}

    def replace(self, new: Mapping[Digest, Tensor]) -> bool:
        """Writes what is new into the file of weights and into the model; whether the model changed."""
        with self.weights.open("r+b") as file:
            for offset, digest in self.outside.items():
                if digest in new:
                    file.seek(offset)
                    file.write(_bytes(new[digest]))
        inside = [(tensor, new[digest]) for tensor, digest in self.inside if digest in new]
        for tensor, value in inside:
            tensor.raw_data = _bytes(value)
        return bool(inside)


class Changes:
    """From the weights that a bundle holds to others of the same names and shapes."""

    def __init__(self, manifest: Manifest, before: Mapping[str, Tensor]) -> None:
        self.sizes = {(p.frames, n * p.batch) for p in manifest.profiles for n in (1, 2)}
        self.digests = {name: self._digests(name, weight) for name, weight in before.items()}
        self.uniform = {
            name for name, weight in before.items() if bool((weight == weight.flatten()[0]).all())
        }
        self.changed: list[str] = []

    def to(self, after: Mapping[str, Tensor], graphs: Mapping[str, DenoiserGraph]) -> dict[Digest, Tensor]:
        """What takes the place of which tensor of the graphs.

        Raises ExportError for a weight that a graph does not hold, and for two that it cannot tell apart.
        """
        now = {name: self._digests(name, weight) for name, weight in after.items()}
        self.changed = [name for name, digests in now.items() if digests[0] != self.digests[name][0]]
        for name in self.changed:
            for file, graph in graphs.items():
                if name in self.uniform or (graph.whole and graph.held.isdisjoint(self.digests[name])):
                    raise _refused(name, file, "a tensor like many" if name in self.uniform else "none of it")
        becomes: dict[Digest, set[Digest]] = defaultdict(set)
        for name, digests in self.digests.items():
            for digest, new in zip(digests, now[name], strict=True):
                becomes[digest].add(new)
        held = set().union(*(graph.held for graph in graphs.values()))
        replacements: dict[Digest, Tensor] = {}
        for name in self.changed:
            forms_of = zip(self.digests[name], turned(name, after[name], self.sizes), strict=True)
            for digest, form in forms_of:
                if digest in held and len(becomes[digest]) > 1:
                    raise _refused(name, ", ".join(graphs), "a tensor that is another weight too")
                if digest in held:
                    replacements[digest] = form
        return replacements

    def _digests(self, name: str, weight: Tensor) -> list[Digest]:
        return [hashlib.sha256(_bytes(form)).digest() for form in turned(name, weight, self.sizes)]


def turned(name: str, weight: Tensor, sizes: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
    """What a graph may hold of a weight: itself, a matrix transposed, and of a table of frame positions the
    rows of its frames, once for each video.  A 1x1 convolution may be a matrix there: in bundles of before
    feed-forward-convolutions.  sizes: pairs of frames and videos."""
    yield weight
    if weight.dim() == 2 or weight.shape[2:] == (1, 1):
        yield weight.flatten(1).t()
    if name.endswith("time_pos_embed.table"):
        for frames, videos in sorted(sizes):
            yield weight[:frames].repeat(videos, 1)


def _weights(checkpoint: Checkpoint, manifest: Manifest) -> dict[str, Tensor]:
    """Of the UNet, rewritten as the export did, by their names in the module."""
    dtype = DTYPES[manifest.precision.option]
    rewrites = rewrites_for("onnxruntime", forms.device_of(dtype))
    modules = Modules(checkpoint, manifest.without_rewrites, rewrites)
    spec = next(e.spec for e in manifest.networks if e.spec.network == "denoiser")
    module = modules.network(spec)
    return {name: t.detach() for name, t in (*module.named_parameters(), *module.named_buffers())}


def _bytes(tensor: Tensor) -> bytes:
    """In row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _digest_at(file: BinaryIO, info: ExternalDataInfo) -> Digest:
    file.seek(info.offset or 0)
    return hashlib.sha256(file.read(info.length)).digest()


def _plans(manifest: Manifest, networks: Iterable[NetworkEntry]) -> list[PlanEntry]:
    keys = {entry.spec.key for entry in networks}
    return [plan for plan in manifest.plans if plan.network in keys]


def _manifest(
    bundle: Bundle,
    fused: Checkpoint,
    denoisers: Iterable[NetworkEntry],
    left_out: Iterable[PlanEntry],
    folder: Path,
) -> Manifest:
    """Of the folder; what was measured of the denoisers with other weights is left out."""
    was = bundle.manifest
    graphs = {e.spec.key: e for e in denoisers}
    changed = {file for e in graphs.values() for file in (*e.graphs.values(), e.weights)}
    gone = {plan.file for plan in left_out}
    files = {
        name: file_entry(folder / name) if name in changed else entry
        for name, entry in was.files.items()
        if name not in gone
    }
    plans = []
    for plan in was.plans:
        if plan.network in graphs and plan.file not in gone:
            entry = graphs[plan.network]
            update = {
                "graph_sha256": files[entry.graphs["tensorrt"]].sha256,
                "weights_sha256": files[entry.weights].sha256,
                "stripped": True,  # what it holds is not used any more
            }
            plans.append(plan.model_copy(update=update))
        elif plan.file not in gone:
            plans.append(plan)
    return was.model_copy(
        update={
            "source": source_of(fused, was.source.weights),
            "files": files,
            "parity": tuple(row for row in was.parity if row.network not in graphs),
            "plans": tuple(plans),
        }
    )


def _refused(weight: str, graph: str, got: str) -> ExportError:
    return ExportError(
        f"{weight} in {graph}",
        expected="a tensor that shows which weight it is, for LoRA to change",
        got=got,
        remedy="Export the checkpoint with its LoRA: `svd-export onnx CHECKPOINT -o BUNDLE --lora FILE`.",
    )
