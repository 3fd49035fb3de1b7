"""A bundle becomes a model repository that a stock Triton Inference Server serves.

    svd/            image in, mp4 out: config.pbtxt, 1/model.py, 1/bundle/ (a copy of the bundle)
    svd_stream/     the same over svd's bundle, with progress and previews on the way (decoupled)
    <network key>/  each network as an onnxruntime model, for hosts with a loop of their own; not the segments
                    of a streamed decoder
    <plan name>/    each TensorRT plan that holds its weights, as a tensorrt model

Files are copied: onnx refuses weights that are links of either kind.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from svd_engine.bundle.manifest import MANIFEST, PlanEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import SettingsError
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.values import at_least
from svd_export import triton_config as config
from svd_export.placing import check_free, placed

MODEL_PY = '''\
"""Served by svd-engine, which the server's Python must be able to import."""

from svd_engine.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0}


@dataclass(frozen=True)
class QueueLimits:
    """How many requests are served at once, how many wait, and for how long."""

    instances: int = 1  # on every GPU, or on the CPU where there is none
    max_queue: int = 8
    timeout: float = 120.0  # seconds that a request may wait

    def __post_init__(self) -> None:
        at_least("instances", self.instances, 1)
        at_least("max-queue", self.max_queue, 1)


def seconds(text: str) -> float:
    """Of a duration such as 120s, 2m or 500ms.  Raises SettingsError unless it is at least a millisecond."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)", text)
    value = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if value < 0.001:
        raise SettingsError(
            "timeout",
            expected="a duration such as 120s, 2m or 500ms",
            got=repr(text),
            remedy="Give a number with its unit.",
        )
    return value


def write_repository(
    bundle: Bundle, folder: Path, limits: QueueLimits, progress: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Writes the model repository to `folder`, which must not exist yet; gives the models' names.

    Raises BundleError when a file of the bundle differs from its hash, ExportError as `placed` does.
    """
    check_free(folder.absolute())
    progress("hashes of the bundle")
    bundle.check_hashes()
    with placed(folder) as aside:
        for name, stream in (("svd", False), ("svd_stream", True)):
            progress(name)
            text = config.video_model(name, bundle.manifest, limits, stream=stream)
            version = _model(aside, name, text)
            (version / "model.py").write_text(MODEL_PY, encoding="utf-8")
        _copy(bundle, aside / "svd/1/bundle", *bundle.manifest.files, MANIFEST)
        for entry in bundle.manifest.networks:
            if entry.spec.segment is not None:  # of use in a chain alone, which svd runs
                continue
            progress(entry.spec.key)
            version = _model(aside, entry.spec.key, config.network_model(entry.spec, "onnxruntime"))
            graph = bundle.graph_name(entry.spec, "onnxruntime")
            _copy(bundle, version, graph, entry.weights)
            (version / graph).rename(version / "model.onnx")
            _warm_up_data(version.parent, entry.spec)
        specs = {entry.spec.key: entry.spec for entry in bundle.manifest.networks}
        for plan in servable(bundle):
            progress(plan.file)
            spec, name = specs[plan.network], Path(plan.file).stem
            version = _model(aside, name, config.network_model(spec, "tensorrt", name))
            _copy(bundle, version, plan.file)
            (version / plan.file).rename(version / "model.plan")
            _warm_up_data(version.parent, spec)
        return sorted(path.name for path in aside.iterdir())


def servable(bundle: Bundle) -> list[PlanEntry]:
    """Plans that Triton's tensorrt backend can load: of TensorRT proper, and with their weights, which it has
    no way to give to a stripped one.  Not of a streamed decoder's segments."""
    return [
        plan
        for plan in bundle.manifest.plans
        if plan.flavour == "tensorrt" and not plan.stripped and bundle.spec(plan).segment is None
    ]


def _model(repository: Path, name: str, text: str) -> Path:
    """The folder of version 1 of a new model."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    return version


def _copy(bundle: Bundle, folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(bundle.folder / name, folder / name)


def _warm_up_data(model: Path, spec: NetworkSpec) -> None:
    """The noise level that the denoiser is warmed up with."""
    for tensor in spec.inputs:
        if not tensor.shape:
            (model / "warmup").mkdir()
            (model / "warmup" / tensor.name).write_bytes(config.ONE)
