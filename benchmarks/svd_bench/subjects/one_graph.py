"""One network as an ONNX graph in a folder, without the bundle around it: what a rung of the ladder needs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svd_bench.documents.strict import StrictModel
from svd_bench.measuring.memory import release
from svd_bench.subjects.cases import Subject, checkpoint_of
from svd_engine.bundle.manifest import NetworkEntry, Runtime
from svd_engine.bundle.reading import Bundle
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.spec.model import Architecture
from svd_engine.spec.tensors import NetworkSpec

RECORD = "exported.json"


class GraphRecord(StrictModel):
    entry: NetworkEntry
    architecture: Architecture
    rewrites: tuple[str, ...]  # that found a place


class OneGraph(Bundle):
    """To ONNX Runtime's backend it is a bundle that holds a single network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = GraphRecord.model_validate_json((folder / RECORD).read_bytes())

    def graph(self, _spec: NetworkSpec, runtime: Runtime, _memory: int | None = None) -> Path:
        return self.folder / self.record.entry.graphs[runtime]


@contextmanager
def exported_graph(subject: Subject, spec: NetworkSpec) -> Iterator[Subject]:
    """The subject with its graph in a temporary folder, as `svd-export onnx` would write it.

    The folder is as large as the weights (6 GB for SVD's UNet in float32); TMPDIR says where it lies.
    Raises ExportError.
    """
    from svd_engine.networks.modules import COMPONENT_OF, Modules
    from svd_export.to_onnx import export_network
    from svd_export.weights import WeightsFile

    checkpoint = checkpoint_of(subject.checkpoint, subject.variant)
    rewrites = rewrites_for("onnxruntime", "cpu" if subject.device == "cpu" else "cuda")
    modules = Modules(checkpoint, subject.without_rewrites, rewrites)
    with tempfile.TemporaryDirectory(prefix="svd-bench-") as name:
        folder = Path(name)
        with WeightsFile(folder / f"{spec.network}.bin") as weights:
            entry = export_network(modules, spec, weights, ["onnxruntime"])
        applied = modules.applied.get(COMPONENT_OF[spec.network], [])
        found = tuple(a.name for a in applied if a.places)
        modules.close()
        release()
        record = GraphRecord(entry=entry, architecture=checkpoint.model.architecture, rewrites=found)
        (folder / RECORD).write_text(record.model_dump_json(), encoding="utf-8")
        yield subject.model_copy(update={"graph": name})
