"""A bundle receives TensorRT plans for the GPU at hand, built from its own graphs, one network at a time.

Each plan is in its place, and in the manifest, before the next is begun: an interrupted build keeps what is
finished, and the same command goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from svd_engine.arguments import one_of
from svd_engine.backends.trt_library import machine, require_tensorrt
from svd_engine.bundle import Bundle, sha256_of
from svd_engine.errors import BackendUnavailable
from svd_engine.manifest import FileEntry, Manifest, NetworkEntry, PlanEntry
from svd_engine.networks.spec import NETWORKS
from svd_engine.plans import Machine, misfit, plan_file
from svd_export.manifest_file import file_entry, update_manifest
from svd_export.placing import move_out, workshop
from svd_export.tensorrt_builder import BuildOptions, Built, build

DEFAULT = BuildOptions()


def build_plans(
    bundle: Bundle,
    options: BuildOptions = DEFAULT,
    networks: Collection[str] = NETWORKS,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[PlanEntry]:
    """Builds what is missing of `networks` ("denoiser", say) and gives the plans of all of them.

    The timing cache lies beside the plans, and is keyed like them, unless a file is named.  Raises
    SettingsError for a network that is none, BackendUnavailable without TensorRT or a GPU, ExportError when
    a plan cannot be built or written, BundleError when the bundle is damaged or holds no graphs for TensorRT.
    """
    for name in networks:
        one_of("network", name, NETWORKS)
    entries = [entry for entry in bundle.manifest.networks if entry.spec.network in networks]
    for entry in entries:
        bundle.graph_name(entry.spec, "tensorrt")  # refused at once where there is none
    here = _machine()
    options = replace(options, refittable=options.refittable or options.stripped)
    if timing_cache is None:
        name = plan_file("timing", here, options.hardware_compatibility, bundle.manifest.dtype)
        timing_cache = (bundle.folder / name).with_suffix(".cache")
    made = []
    with workshop(bundle.folder) as aside:
        for number, entry in enumerate(entries, 1):
            row = _finished(bundle, entry, here, options)
            if row is not None:
                progress(f"{entry.spec.key}: {row.file} is there already")
            else:
                progress(f"{entry.spec.key}: building, {number} of {len(entries)}")
                timings = timing_cache.read_bytes() if timing_cache.is_file() else b""
                built = build(bundle.graph(entry.spec, "tensorrt"), options, timings, progress)
                row = _row(bundle, entry, here, options, built)
                _write(aside / row.file, built.plan)
                _place(bundle.folder, row, aside)
                _keep(timing_cache, built.timings)
            made.append(row)
    return made


def _machine() -> Machine:
    require_tensorrt()
    if not torch.cuda.device_count():
        raise BackendUnavailable(
            "building TensorRT plans",
            expected="a CUDA GPU of the kind that will run them",
            got=f"none that torch {torch.__version__} can use",
            remedy="Copy the bundle to a machine with such a GPU and run the same command there.",
        )
    return machine(torch.device("cuda", torch.cuda.current_device()))


def _finished(bundle: Bundle, entry: NetworkEntry, here: Machine, options: BuildOptions) -> PlanEntry | None:
    """The plan that this very command would build, when the bundle has it, whole."""
    for row in bundle.plans(entry.spec):
        same = options == BuildOptions(
            row.workspace_bytes,
            row.optimization_level,
            row.refittable,
            row.stripped,
            row.hardware_compatibility,
        )
        whole = sha256_of(bundle.folder / row.file) == bundle.manifest.files[row.file].sha256
        if same and whole and not misfit(bundle, entry.spec, row, here):
            return row
    return None


def _row(
    bundle: Bundle, entry: NetworkEntry, here: Machine, options: BuildOptions, built: Built
) -> PlanEntry:
    files = bundle.manifest.files
    return PlanEntry(
        network=entry.spec.key,
        file=plan_file(entry.spec.key, here, options.hardware_compatibility, entry.dtype),
        tensorrt=here.tensorrt,
        gpu=here.gpu,
        compute_capability=here.compute_capability,
        hardware_compatibility=options.hardware_compatibility,
        dtype=entry.dtype,
        graph_sha256=files[bundle.graph_name(entry.spec, "tensorrt")].sha256,
        weights_sha256=files[entry.weights].sha256,
        stripped=options.stripped,
        refittable=options.refittable,
        optimization_level=options.optimization_level,
        workspace_bytes=options.workspace_bytes,
        device_memory_bytes=built.device_memory_bytes,
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
