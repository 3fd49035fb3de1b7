"""Holds each network of a bundle against eager torch: same weights, same inputs, float32 reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from svd_engine.backends.onnxruntime import OrtBackend
from svd_engine.bundle.manifest import MANIFEST, NetworkEntry, ParityEntry
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.lora import lora_file
from svd_engine.checkpoint.opening import (
    Checkpoint,
    is_single_file,
    open_checkpoint,
    random_checkpoint,
    with_lora,
)
from svd_engine.checkpoint.weight_files import describe_file
from svd_engine.cli import console
from svd_engine.errors import CheckpointError, NonFiniteOutput, ParityError, SettingsError
from svd_engine.networks.modules import Modules
from svd_engine.networks.parity import example_inputs, tolerance
from svd_engine.networks.rewrites import REWRITES
from svd_engine.spec.network import named_outputs
from svd_engine.spec.weights import COMPONENTS, Component
from svd_export.manifest_file import update_manifest

TINY = torch.finfo(torch.float32).tiny  # in place of the largest value of a reference of zeros


def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    device: torch.device,
    progress: Callable[[str], None],
    write: bool = True,
) -> list[ParityEntry]:
    """Runs every network on ONNX Runtime and eagerly; writes the rows into the bundle's manifest.

    `write` off leaves the bundle as it is.

    The reference is the network as diffusers has it, without rewrites, computing in float32 on the
    weights as the bundle rounds them.  Raises ParityError beyond tolerance (the rows are written all
    the same), or when `checkpoint` is not the one that the bundle was made from; NonFiniteOutput when
    a network gives NaN, OutputError when the manifest cannot be written.
    """
    manifest = bundle.manifest
    runtime = OrtBackend(bundle, device)
    if write:
        console.check_folder(bundle.folder / MANIFEST, "use write=False")
    check_exported_from(bundle, checkpoint)
    rows: list[ParityEntry] = []
    for entry in manifest.networks:
        progress(entry.spec.key)
        rows += compare(runtime, checkpoint, entry)
    if write:
        update_manifest(bundle.folder, lambda now: now.model_copy(update={"parity": tuple(rows)}))
    for row in rows:
        if not row.relative <= row.tolerance:  # written so that NaN fails
            raise ParityError(
                f"{row.output} of network {row.network} on {row.backend}",
                expected=f"a difference of at most {row.tolerance:g} of the reference's largest value",
                got=f"{row.relative:g} (max abs {row.max_abs:g}, cosine {row.cosine:.6f})",
                remedy="To find the cause, export in fp32, or without a rewrite: "
                "`svd-export onnx CHECKPOINT -o BUNDLE --without-rewrite NAME`.",
            )
    return rows


def exported_from(
    bundle: Bundle,
    checkpoint: str | None = None,
    variant: str | None = None,
    parts: Mapping[Component, str | Path] | None = None,
    lora: Mapping[str | Path, float] | None = None,
    lora_partial: bool = False,
    exported_lora: Collection[str | Path] = (),
) -> Checkpoint:
    """What the bundle was made from, opened.

    checkpoint, variant, parts: in place of those that the manifest names, which have moved say; a part that
    is left out is the manifest's.  exported_lora: files of the manifest's LoRA that have moved, told by their
    content.  lora, lora_partial: other LoRA than the manifest's, as `open_checkpoint` takes it.  Raises
    CheckpointError, SettingsError.
    """
    exported = bundle.manifest.source
    name = checkpoint or exported.checkpoint
    if lora is None and not lora_partial:
        lora = _lora_of_export(bundle, exported_lora)
        lora_partial = any(one.left for one in exported.lora)
    if checkpoint is None and (family := bundle.manifest.random_family):
        if variant or parts:
            raise SettingsError(
                f"checkpoint {name}",
                expected="no variant and no parts beside random weights, which come from no file",
                got=", ".join(filter(None, (variant, *(parts or ())))),
                remedy="Leave them out.",
            )
        plain = random_checkpoint(family)
        return with_lora(plain, lora, lora_partial) if lora else plain
    where = name, variant or exported.variant, bundle.manifest.model.frames if is_single_file(name) else None
    if checkpoint is None:
        _check_there(bundle, *where)
    return open_checkpoint(*where, {**exported.parts, **(parts or {})}, lora, lora_partial)


def _lora_of_export(bundle: Bundle, moved: Collection[str | Path]) -> dict[str | Path, float]:
    """Scales by file, of `moved` where these have the content of the manifest's.

    Raises SettingsError for a file of other content, CheckpointError where one of the manifest's is gone.
    """
    exported = bundle.manifest.source.lora
    now = {describe_file("unet", lora_file(file)).sha256: file for file in moved}
    for sha256, file in now.items():
        if sha256 not in {one.sha256 for one in exported}:
            raise SettingsError(
                f"LoRA {file}",
                expected=f"the content of one that {bundle.folder} was exported with",
                got=f"sha256 {sha256}",
                remedy="Pass those alone that its manifest names, from where they lie now.",
            )
    for one in exported:
        if one.sha256 not in now and not Path(one.file).expanduser().exists():
            raise CheckpointError(
                f"LoRA {one.file}",
                expected=f"what {bundle.folder} was exported with",
                got="no such file",
                remedy="Pass exported_lora=FILE, the path where it lies now.",
            )
    return {now.get(one.sha256, one.file): one.scale for one in exported}


def _check_there(bundle: Bundle, name: str, variant: str | None, frames: int | None) -> None:
    """Raises CheckpointError where the manifest's checkpoint cannot be opened: it may be another path now."""
    try:
        open_checkpoint(name, variant, frames)
    except CheckpointError as error:
        raise CheckpointError(
            error.what,
            expected=f"what {bundle.folder} was exported from, to be opened from here",
            got=error.got,
            remedy="Pass checkpoint=ORIGINAL, the path where it lies now.",
        ) from error


def check_exported_from(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises ParityError when the bundle was made from another checkpoint."""
    source, digest = bundle.manifest.source, checkpoint.digest()
    if digest == source.digest:
        return
    here = {file for component in COMPONENTS for file in checkpoint.weight_files(component)}
    others = [f"{file.component}/{file.file}" for file in source.weights if file not in here]
    raise ParityError(
        f"checkpoint {checkpoint.source}",
        expected=f"the one that {bundle.folder} was made from, digest {source.digest}",
        got=f"digest {digest}" + (f", without the exported {', '.join(others[:3])}" if others else ""),
        remedy="Use checkpoint=ORIGINAL, opened with the variant, the parts and the LoRA that it was "
        "exported with, wherever these lie now.",
    )


def compare(runtime: OrtBackend, checkpoint: Checkpoint, entry: NetworkEntry) -> list[ParityEntry]:
    """A row for each output.  The two sides are loaded one after the other."""
    spec = entry.spec
    inputs = example_inputs(spec, checkpoint.model.architecture.conditioning)
    network = runtime.open(spec)
    outputs = network(**{name: tensor.to(runtime.device) for name, tensor in inputs.items()})
    got = {name: tensor.cpu().clone() for name, tensor in outputs.items()}
    where = f"{network.placement.detail} {network.placement.device}"
    network.close()
    modules = Modules(checkpoint, without_rewrites=[r.name for r in REWRITES])
    with torch.no_grad():
        reference = named_outputs(spec, modules.network(spec).float()(**inputs))
    return differences(entry, where, got, reference)


def differences(
    entry: NetworkEntry, backend: str, got: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> list[ParityEntry]:
    """A row for each output of a network.  Raises NonFiniteOutput."""
    return [difference(entry, name, backend, got[name], reference[name]) for name in reference]


def difference(entry: NetworkEntry, output: str, backend: str, got: Tensor, reference: Tensor) -> ParityEntry:
    a, b = got.double().flatten(), reference.double().flatten()
    wrong = [where for where, t in (("torch", b), (backend, a)) if not t.isfinite().all()]
    if wrong:  # no number to write
        raise NonFiniteOutput(
            f"{output} of network {entry.spec.key}",
            expected="finite numbers",
            got=f"NaN or infinity from {' and '.join(wrong)}",
            remedy="The checkpoint is damaged." if "torch" in wrong else "Export the bundle in bf16 or fp32.",
        )
    max_abs = float((a - b).abs().max())
    return ParityEntry(
        network=entry.spec.key,
        output=output,
        backend=backend,
        max_abs=max_abs,
        relative=max_abs / max(float(b.abs().max()), TINY),
        cosine=float(torch.nn.functional.cosine_similarity(a, b, dim=0)),
        tolerance=tolerance(entry.spec),
    )
