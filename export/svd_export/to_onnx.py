"""A checkpoint becomes a bundle: each network traced at its static shapes, written and checked.

No network is run: the exporter works on shapes alone.  Networks are loaded one after the other, so the
peak is one network's weights and its graph.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.fx import config as tracing

from svd_engine import report
from svd_engine.arguments import dtype_name
from svd_engine.bundle.manifest import (
    CheckpointSource,
    Manifest,
    NetworkEntry,
    RewriteEntry,
    Runtime,
    check_profile,
)
from svd_engine.checkpoint.configs import unet_levels, vae_levels
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.errors import ExportError, SettingsError
from svd_engine.host_memory import give_back_freed
from svd_engine.networks.modules import Modules
from svd_engine.networks.rewrites import rewrites_for
from svd_engine.networks.single_frames import one_for_all
from svd_engine.spec.precision import Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import SHALLOW, feature_of, reusing_specs
from svd_engine.spec.streaming import SEGMENT, streaming_of
from svd_engine.spec.tables import NETWORKS, segments, specs_of
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.spec.weights import WeightFile
from svd_engine.values import at_least
from svd_export import forms
from svd_export.manifest_file import file_entry, write_manifest
from svd_export.placing import placed
from svd_export.simplify import simplify
from svd_export.unroll import unroll
from svd_export.weights import WeightsFile

Say = Callable[[str], None]  # a line for whoever waits
NO_STACK_TRACES = "do_not_emit_stack_traces"  # a switch of torch.fx.config


def export_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    profiles: Sequence[Profile],
    dtype: torch.dtype,
    without_rewrites: Collection[str] = (),
    progress: Say = lambda line: None,
    reuse_branch: int | None = None,
    stream_decoder: int | None = None,
) -> Manifest:
    """Writes the bundle of `checkpoint` for `profiles` to `folder`, which must not exist yet.

    `dtype` decides which runtimes it has graphs for, see `forms`.  `progress` is told each network as its
    work begins.  reuse_branch: also a full and a shallow denoiser of every profile, see `spec.reuse`.
    stream_decoder: also a streamed decoder of every profile, so many frames at a time: see `spec.streaming`.
    Raises SettingsError for a profile, a branch or a slice out of bounds, ExportError when the place is taken
    or cannot be written or a network cannot be exported, CheckpointError for the checkpoint's own faults.
    """
    architecture, precision = checkpoint.model.architecture, Precision.of(dtype_name(dtype))
    feature = None
    if reuse_branch is not None:
        feature = feature_of(*unet_levels(checkpoint.configs), at_least("reuse branch", reuse_branch, 0))
    streaming = None
    if stream_decoder is not None:
        size = _slice_of(profiles, stream_decoder)
        streaming = streaming_of(*vae_levels(checkpoint.configs), size)
    for profile in profiles:
        check_profile(profile, architecture, feature, streaming)
    rewrites = rewrites_for("onnxruntime", forms.device_of(dtype))
    modules = Modules(checkpoint, without_rewrites, rewrites)
    of_profiles = [specs_of(p, architecture, precision) for p in profiles]
    reusing = [reusing_specs(specs[2], feature) for specs in of_profiles] if feature else []
    streamed = [segments(p, architecture, precision, streaming) for p in profiles if streaming]
    specs = dict.fromkeys(chain(*of_profiles, *reusing, *streamed))
    with placed(folder) as aside:
        entries: list[NetworkEntry] = []
        for name in dict.fromkeys(map(weights_name, NETWORKS)):
            of_network = [spec for spec in specs if weights_name(spec.network) == name]
            with WeightsFile(aside / f"{name}.bin") as weights:
                for spec in of_network:
                    progress(spec.key)
                    entries.append(export_network(modules, spec, weights, forms.runtimes_of(dtype)))
            for entry in entries[-len(of_network) :]:
                for graph in entry.graphs.values():
                    check(aside / graph)
            modules.release(of_network[0])
            gc.collect()  # a traced graph refers to itself, and to the weights
            give_back_freed()
        manifest = Manifest(
            model=checkpoint.model,
            source=source_of(checkpoint, chain(*modules.weight_files.values())),
            precision=precision,
            opset=forms.OPSET,
            profiles=tuple(profiles),
            reuse=feature,
            streaming=streaming,
            networks=tuple(entries),
            files={path.name: file_entry(path) for path in sorted(aside.iterdir())},
            rewrites=tuple(
                RewriteEntry(network=part, name=a.name, places=a.places, left_alone=a.left_alone)
                for part, applied in modules.applied.items()
                for a in applied
            ),
            without_rewrites=tuple(without_rewrites),
            versions=report.versions(),
        )
        write_manifest(aside, manifest)
    return manifest


def _slice_of(profiles: Sequence[Profile], frames: int) -> int:
    """Raises SettingsError for a slice that is not shorter than every video."""
    size, shortest = at_least("stream decoder", frames, 1), min(profile.frames for profile in profiles)
    if size >= shortest:
        raise SettingsError(
            "stream decoder",
            expected=f"fewer frames at a time than a video's {shortest}",
            got=str(size),
            remedy="Take fewer, or leave it out: the whole decoder takes all.",
        )
    return size


def weights_name(network: str) -> str:
    """Of the file that holds a network's weights: all denoisers share one, a decoder and its segments too."""
    return {SHALLOW: "denoiser", SEGMENT: "vae_decoder"}.get(network, network)


def source_of(checkpoint: Checkpoint, weights: Iterable[WeightFile]) -> CheckpointSource:
    """What the manifest says of where the `weights` came from, enough to open the checkpoint again."""
    return CheckpointSource(
        checkpoint=checkpoint.source,
        digest=checkpoint.digest(),
        variant=checkpoint.variant,
        parts=dict(checkpoint.parts),
        lora=checkpoint.lora,
        weights=tuple(weights),
    )


def check(graph: Path) -> None:
    """onnx's checker and full shape inference, on what was written.  Raises ExportError."""
    try:
        onnx.checker.check_model(str(graph), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"graph {graph.name}",
            expected="a model that onnx's checker accepts",
            got=str(error),
            remedy="Report this with the versions of torch, onnx and onnxscript.",
        ) from error


def trace(module: nn.Module, spec: NetworkSpec) -> ir.Model:
    """The ONNX form of a module at the shapes of its table.  Raises ExportError with the exporter's words."""
    example = {t.name: torch.zeros(t.shape, dtype=getattr(torch, t.dtype)) for t in spec.inputs}
    try:
        with _quiet(), without_stack_traces(), torch.no_grad(), one_for_all():
            program = torch.onnx.export(
                module,
                kwargs=example,
                input_names=list(example),
                output_names=[t.name for t in spec.outputs],
                opset_version=forms.OPSET,
                dynamo=True,
                external_data=True,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error  # the exporter's own message is advice to its developers
        raise ExportError(
            f"network {spec.key}",
            expected="a module that torch.onnx.export can trace",
            got=f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}",
            remedy="Use the versions in constraints.txt.",
        ) from error
    assert program is not None  # dynamo=True always returns a program
    model: ir.Model = program.model
    simplify(model)
    unroll(model)
    return model


def export_network(
    modules: Modules, spec: NetworkSpec, weights: WeightsFile, runtimes: Sequence[Runtime]
) -> NetworkEntry:
    """Writes a graph for each of `runtimes` beside `weights`, which receive their large tensors."""
    traced = trace(modules.network(spec), spec)
    forms.settle(traced)
    traced.graph.name = spec.key
    weights.move_out(traced)
    settled = ir.to_proto(traced)  # small, for it only refers to the weights
    graphs: dict[Runtime, str] = {}
    for runtime in runtimes:
        model = ir.from_proto(settled)
        ir.external_data.set_base_dir(model.graph, weights.path.parent)
        forms.shape_for(runtime, spec.network, model.graph)
        weights.move_out(model)
        graphs[runtime] = graph_file(spec, runtime)
        ir.save(model, weights.path.with_name(graphs[runtime]))
    return NetworkEntry(spec=spec, graphs=graphs, weights=weights.path.name)


def graph_file(spec: NetworkSpec, runtime: Runtime) -> str:
    return f"{spec.key}{'' if runtime == 'onnxruntime' else f'.{runtime}'}.onnx"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own progress and its notices about torchvision are not ours to show."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def without_stack_traces() -> Iterator[None]:
    """torch notes who called each operator, in a tenth of a trace's time; `forms.settle` would remove it.

    A torch that has no such switch takes no notice.
    """
    before = getattr(tracing, NO_STACK_TRACES, False)
    setattr(tracing, NO_STACK_TRACES, True)
    try:
        yield
    finally:
        setattr(tracing, NO_STACK_TRACES, before)
