"""A bundle receives TensorRT plans, built from its own graphs, one network at a time.

Each plan is in its place, and in the manifest, before the next is begun: an interrupted build keeps what is
finished, and the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from svd_engine.backends.tensorrt.library import require
from svd_engine.bundle.flavours import Flavour, Target
from svd_engine.bundle.manifest import FileEntry, Manifest, NetworkEntry, PlanEntry
from svd_engine.bundle.plans import plan_file, stale
from svd_engine.bundle.reading import Bundle, sha256_of
from svd_engine.report import peak_host_bytes
from svd_engine.spec.tables import NETWORKS
from svd_engine.values import one_of
from svd_export.manifest_file import file_entry, update_manifest
from svd_export.placing import move_out, workshop
from svd_export.tensorrt_builder import DEFAULT_LEVEL, DEFAULT_WORKSPACE, BuildOptions, Built, build
from svd_export.tensorrt_target import check_options, choose_flavour, choose_target

DEFAULT = BuildOptions()
SECONDS_OF_A_NODE = 0.005  # measured on two CPU cores: 7.5 s for the denoiser of the demo
SECONDS_OF_A_BYTE = 9 / 2**30  # and 30 s for SVD-XT's denoiser, of 2.6 GiB
BYTES_OF_A_BYTE = 3.6  # peak memory of a build for a byte of weights: 9.6 GB for SVD-XT's denoiser
BYTES_AT_LEAST = 700 * 2**20


@dataclass(frozen=True)
class Order:
    """What is asked of a build, settled."""

    flavour: Flavour
    version: str
    target: Target
    options: BuildOptions


def build_plans(
    bundle: Bundle,
    options: BuildOptions = DEFAULT,
    networks: Collection[str] | None = None,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    flavour: str | None = None,
    target: str | None = None,
) -> list[PlanEntry]:
    """Builds what is missing of `networks` ("denoiser", say; None is all) and gives the plans of all of them.

    flavour: "tensorrt" or "tensorrt-rtx"; None takes the one installed, or with both the one for the card
    here.  target: "here", "portable" or "sm86,sm89"; None is the card here, or portable without one.  The
    timing cache lies beside the plans, and is keyed like them, unless a file is named.

    Raises SettingsError for a network, flavour, target or option that is none, ProfileError for a network
    that the bundle has not, BackendUnavailable without the flavour or a GPU that it needs, ExportError when a
    plan cannot be built or written, BundleError when the bundle is damaged or holds no graphs for TensorRT.
    """
    for name in networks or ():
        one_of("network", name, NETWORKS)
    entries = bundle.entries(networks)
    for entry in entries:
        bundle.graph_name(entry.spec, "tensorrt")  # refused at once where there is none
    order = _order(options, timing_cache, flavour, target, progress)
    if timing_cache is None:
        name = plan_file("timing", order.flavour.name, order.version, order.target, bundle.manifest.precision)
        timing_cache = (bundle.folder / name).with_suffix(".cache")
    made = []
    with workshop(bundle.folder) as aside:
        for number, entry in enumerate(entries, 1):
            row = _finished(bundle, entry, order)
            if row is not None:
                progress(f"{entry.spec.key}: {row.file} is there already")
            else:
                graph = bundle.graph(entry.spec, "tensorrt")
                expected = _expected(order.flavour, graph, bundle.folder / entry.weights)
                progress(f"{entry.spec.key}: building, {number} of {len(entries)}{expected}")
                timings = timing_cache.read_bytes() if timing_cache.is_file() else b""
                built = build(graph, order.flavour, order.target, order.options, timings, progress)
                row = _row(bundle, entry, order, built)
                _write(aside / row.file, built.plan)
                _place(bundle.folder, row, aside)
                if built.timings is not None:
                    _keep(timing_cache, built.timings)
                progress(f"{entry.spec.key}: built; at most {peak_host_bytes() / 2**30:.1f} GiB so far")
            made.append(row)
    return made


def _order(
    options: BuildOptions,
    timing_cache: Path | None,
    flavour: str | None,
    target: str | None,
    progress: Callable[[str], None],
) -> Order:
    given = asdict(options) | {
        "timing_cache": timing_cache,
        "hardware_compatibility": _beyond(options),
    }
    chosen = choose_flavour(flavour, target, given)
    version = require(chosen.flavour)
    check_options(chosen.flavour, given)
    cards = choose_target(chosen.flavour, target, options.hardware_compatibility)
    progress(f"{chosen.flavour.title} {version} ({chosen.reason}), for {cards.cards}")
    if chosen.flavour.builds_without_gpu:  # without these options
        return Order(chosen.flavour, version, cards, options)
    settled = replace(
        options,
        workspace_bytes=options.workspace_bytes or DEFAULT_WORKSPACE,
        optimization_level=DEFAULT_LEVEL
        if options.optimization_level is None
        else options.optimization_level,
    )
    return Order(chosen.flavour, version, cards, settled)


def _beyond(options: BuildOptions) -> str:
    """The compatibility that was asked for; empty for the default."""
    return "" if options.hardware_compatibility == "none" else options.hardware_compatibility


def _expected(flavour: Flavour, graph: Path, weights: Path) -> str:
    """Time and memory that a build will take, in words; a warning when there is less memory than that."""
    if not flavour.builds_without_gpu:
        return "; it times kernels on the GPU, which takes minutes"
    import onnx

    nodes = len(onnx.load(str(graph), load_external_data=False).graph.node)
    size = weights.stat().st_size
    seconds = SECONDS_OF_A_NODE * nodes + SECONDS_OF_A_BYTE * size
    memory = BYTES_AT_LEAST + BYTES_OF_A_BYTE * size
    free = psutil.virtual_memory().available
    less = f", and only {free / 2**30:.1f} GiB are free" if free < memory else ""
    return f"; about {max(1, seconds):.0f} s on two quiet CPU cores and {memory / 2**30:.1f} GiB{less}"


def _finished(bundle: Bundle, entry: NetworkEntry, order: Order) -> PlanEntry | None:
    """The plan that this very command would build, when the bundle has it, whole."""
    for row in bundle.plans(entry.spec):
        same = (row.flavour, row.version, row.target) == (order.flavour.name, order.version, order.target)
        alike = (row.workspace_bytes, row.optimization_level, row.other_weights, row.stripped) == (
            order.options.workspace_bytes,
            order.options.optimization_level,
            order.options.refittable,
            order.options.stripped,
        )
        streams = (row.least_weight_bytes is not None) == order.options.stream_weights
        if not (same and alike and streams) or stale(bundle, entry.spec, row) or bundle.damage(row.file):
            continue
        if sha256_of(bundle.folder / row.file) == bundle.manifest.files[row.file].sha256:
            return row
    return None


def _row(bundle: Bundle, entry: NetworkEntry, order: Order, built: Built) -> PlanEntry:
    files, options = bundle.manifest.files, order.options
    return PlanEntry(
        network=entry.spec.key,
        file=plan_file(entry.spec.key, order.flavour.name, order.version, order.target, entry.spec.precision),
        flavour=order.flavour.name,
        version=order.version,
        target=order.target,
        precision=entry.spec.precision,
        graph_sha256=files[bundle.graph_name(entry.spec, "tensorrt")].sha256,
        weights_sha256=files[entry.weights].sha256,
        stripped=options.stripped,
        refittable=options.refittable or options.stripped,
        other_weights=options.refittable,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        device_memory_bytes=built.device_memory_bytes,
        compiled=built.compiled,
        least_weight_bytes=built.least_weight_bytes,
    )


def _place(folder: Path, row: PlanEntry, aside: Path) -> None:
    """Whenever this is interrupted, the manifest agrees with the files: an old plan leaves it first."""

    def without(manifest: Manifest) -> Manifest:
        files = {name: entry for name, entry in manifest.files.items() if name != row.file}
        plans = tuple(plan for plan in manifest.plans if plan.file != row.file)
        return manifest.model_copy(update={"files": files, "plans": plans})

    def listed(manifest: Manifest, entry: FileEntry) -> Manifest:
        files, plans = {**manifest.files, row.file: entry}, (*manifest.plans, row)
        return manifest.model_copy(update={"files": files, "plans": plans})

    entry = file_entry(aside / row.file)
    update_manifest(folder, without)
    move_out(aside / row.file, folder / row.file)
    update_manifest(folder, lambda manifest: listed(manifest, entry))


def _keep(path: Path, content: memoryview) -> None:
    """Whole or not at all, by way of its own folder, for it may lie on another disk than the bundle."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        _write(aside, content)
        move_out(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write(path: Path, content: memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
