"""The manifest of a bundle: its schema, and how it is read.  Knows no other file.

Strict: a field that is not in the schema, or of another type, is refused, so that a number never means
something else to another reader.  `format` changes when a reader of the old one would be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from svd_engine.bundle.flavours import FlavourName, Target
from svd_engine.errors import BundleError, SettingsError
from svd_engine.shell import quoted
from svd_engine.spec.bounds import Bytes, Count, Finite, Opset, OptimizationLevel, Positive, Sha256, Text
from svd_engine.spec.model import Architecture, Model
from svd_engine.spec.precision import DTYPE_OPTIONS, Precision
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature
from svd_engine.spec.streaming import Streaming
from svd_engine.spec.tables import too_large
from svd_engine.spec.tensors import NetworkSpec
from svd_engine.spec.weights import Component, Family, LoraFile, WeightFile

FORMAT: Literal[3] = 3
MANIFEST = "manifest.json"
MANIFEST_BYTES = 4 * 2**20  # at most; one network takes about 1000
SCHEMA = "manifest.schema.json"
Runtime = Literal["onnxruntime", "tensorrt"]  # that a graph is for; tensorrt: of either flavour


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    bytes: Bytes
    sha256: Sha256


class CheckpointSource(_Strict):
    checkpoint: Text  # as the user named it
    digest: Text  # Checkpoint.digest(): sha256 over its weights and configs
    variant: Text | None = None  # of the weight files, as the user asked for it
    parts: dict[Component, Text] = Field(default_factory=dict)  # from elsewhere, as the user named them
    lora: tuple[LoraFile, ...] = ()  # fused into the UNet
    weights: tuple[WeightFile, ...] = ()  # that were read; none for random weights


class NetworkEntry(_Strict):
    spec: NetworkSpec
    graphs: Annotated[dict[Runtime, str], Field(min_length=1)]  # file names; the same function, same weights
    weights: str  # file name


class RewriteEntry(_Strict):
    network: Text
    name: Text
    places: Count
    left_alone: tuple[str, ...] = ()


class ParityEntry(_Strict):
    """One output of a network of this bundle against eager torch in float32, same weights, same inputs."""

    network: Text  # key
    output: Text
    backend: Text
    max_abs: Finite
    relative: Finite  # max_abs over the largest absolute value of the reference
    cosine: Finite
    tolerance: Positive  # on `relative`


class CompiledFigures(_Strict):
    """What TensorRT's compiler made of one network, one call of it; `svd-bench compiled` says how counted."""

    kernels: Count
    read_bytes: Bytes  # over all kernels, each tensor that one takes at its full size, weights included
    written_bytes: Bytes
    activation_bytes: Bytes  # memory beside the weights
    weights_bytes: Bytes


class PlanEntry(_Strict):
    """A TensorRT engine of one network, and all that decides where it runs; see `plans`."""

    network: str  # key
    file: str  # name; its size and sha256 stand in `files`
    flavour: FlavourName
    version: Text  # of that TensorRT; no other reads it
    target: Target  # the cards that it runs on
    precision: Precision
    graph_sha256: Sha256  # of the ONNX graph and weights that it was built from
    weights_sha256: Sha256
    stripped: bool  # its weights come from the network's file when it is loaded: it holds none, or old ones
    refittable: bool  # its weights can be replaced
    other_weights: bool = False  # and by others than those it was built from, as LoRA makes them
    least_weight_bytes: Bytes | None = None  # on the GPU while the others stream; None: they cannot
    optimization_level: OptimizationLevel | None  # None: the flavour has no such option
    workspace_bytes: Bytes | None  # limit of a kernel's scratch memory that the builder had; None as above
    device_memory_bytes: Bytes  # activations of one execution context
    compiled: CompiledFigures | None  # None: the flavour's log does not say


class Manifest(_Strict):
    format: Literal[3] = FORMAT
    model: Model
    source: CheckpointSource
    precision: Precision  # that was asked for; a network's spec has its own
    opset: Opset
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1, max_length=256)]
    reuse: Feature | None = None  # of a full and a shallow denoiser beside the plain one of every profile
    streaming: Streaming | None = None  # of a streamed decoder beside the plain one of every profile
    networks: Annotated[tuple[NetworkEntry, ...], Field(max_length=4096)]
    files: dict[str, FileEntry]
    rewrites: tuple[RewriteEntry, ...] = ()
    without_rewrites: tuple[str, ...] = ()
    versions: dict[Text, Text]
    parity: tuple[ParityEntry, ...] = ()
    plans: tuple[PlanEntry, ...] = ()

    @model_validator(mode="after")
    def _numbers_go_together(self) -> Self:
        if not self.model.sigma_min < self.model.sigma_max:
            raise ValueError(
                f"sigma_min {self.model.sigma_min} is not below sigma_max {self.model.sigma_max}"
            )
        keys = [entry.spec.key for entry in self.networks]
        if len(set(keys)) < len(keys):
            raise ValueError("a network that stands twice")
        for profile in self.profiles:
            if fault := too_large(profile, self.model.architecture, self.reuse, self.streaming):
                raise ValueError(fault)
        if self.reuse is None and any(entry.spec.kept for entry in self.networks):
            raise ValueError("a denoiser that reuses, and nothing said of reuse")
        if self.streaming is None and any(entry.spec.segment is not None for entry in self.networks):
            raise ValueError("a segment of a decoder, and nothing said of streaming")
        if self.streaming and self.streaming.slice_frames >= min(p.frames for p in self.profiles):
            raise ValueError("a slice of a streamed decoder that is not shorter than every video")
        return self

    @property
    def random_family(self) -> Family | None:
        """Whose architecture it has, when made by `checkpoint.random_checkpoint`: the source says so."""
        names: dict[str, Family] = {f"random:{family}": family for family in get_args(Family)}
        return names.get(self.source.checkpoint)

    @property
    def export_source(self) -> str:
        """The arguments by which `svd-export onnx` finds the bundle's checkpoint again."""
        if self.random_family:
            return f"--random-weights {self.random_family}"
        source = self.source
        variant = f" --variant {quoted(source.variant)}" if source.variant else ""
        options = {part.replace("_", "-"): file for part, file in source.parts.items()}
        parts = "".join(f" --{name} {quoted(file)}" for name, file in options.items())
        lora = "".join(f" --lora {quoted(f'{one.file}:{one.scale!r}')}" for one in source.lora)
        partial = " --lora-partial" if any(one.left for one in source.lora) else ""
        return quoted(source.checkpoint) + variant + parts + lora + partial


def read_manifest(folder: Path) -> Manifest:
    """Raises BundleError when there is none, or one of another format or against the schema."""
    path = folder / MANIFEST
    if path.is_symlink() or (path.is_file() and path.stat().st_size > MANIFEST_BYTES):
        raise BundleError(
            str(path),
            expected=f"a regular file of at most {MANIFEST_BYTES:,} bytes",
            got="a link" if path.is_symlink() else f"{path.stat().st_size:,} bytes",
            remedy="Copy the whole bundle again, links resolved, or export it again.",
        )
    if not path.is_file():
        raise BundleError(
            f"bundle {folder}",
            expected=f"a folder with {MANIFEST}",
            got="no such file" if folder.is_dir() else "no such folder",
            remedy="Make one with: svd-export onnx CHECKPOINT -o BUNDLE",
        )
    try:
        content = path.read_bytes()
        document = json.loads(content.decode(), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            str(path), expected="a JSON document", got=str(error), remedy="Export the bundle again."
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int or version != FORMAT:  # True and 1.0 are equal to 1
        raise BundleError(
            str(path),
            expected=f"bundle format {FORMAT}",
            got=f"format {version}",
            remedy=f"Export it again: {_export_of(document)}",
        )
    try:
        return Manifest.model_validate_json(content)  # strict, and JSON has no tuples: not `document`
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{path}, field {field}" if field else str(path),
            expected=f"a manifest that follows {SCHEMA}",
            got=first["msg"],
            remedy="Export the bundle again.",
        ) from error


def export_command(source: str, profiles: Sequence[Profile], changes: str) -> str:
    """Makes a bundle of these profiles; `source` and `changes` are arguments of `svd-export onnx`."""
    p = profiles[0]
    frames = "".join(f" --frames {n}" for n in dict.fromkeys(p.frames for p in profiles))
    modes = "".join(f" --guidance {g}" for g in dict.fromkeys(p.guidance for p in profiles))
    batch = f" --batch {p.batch}" if p.batch > 1 else ""
    chunks = dict.fromkeys(p.decode_chunk for p in profiles)
    whole = all(p.decode_chunk == p.frames for p in profiles)
    chunk = "" if whole else "".join(f" --decode-chunk {n}" for n in chunks)
    return (
        f"svd-export onnx {source} -o NEW_BUNDLE{frames} --height {p.height} "
        f"--width {p.width}{batch}{modes}{chunk} {changes}"
    )


def _export_of(document: object) -> str:
    """What makes the bundle of a manifest of whatever format again, as far as its fields can be read."""
    fields = document if isinstance(document, dict) else {}
    source = _checkpoint_of(fields.get("source"))
    named = fields.get("precision", fields.get("dtype"))  # formats 1 and 2 had one type for both
    dtype = named.get("weights") if isinstance(named, dict) else named
    written = (option for known, option in DTYPE_OPTIONS.items() if known == dtype)
    precision = " ".join(f"--dtype {option}" for option in written)
    try:
        listed = json.dumps(fields.get("profiles"))
        profiles = TypeAdapter(Annotated[list[Profile], Field(min_length=1)]).validate_json(listed)
    except (ValidationError, RecursionError):
        return f"svd-export onnx {source} -o NEW_BUNDLE {precision}".strip()
    return export_command(source, profiles, precision).strip()


def _checkpoint_of(source: object) -> str:
    """The checkpoint that a manifest's source names, as an argument; else a placeholder."""
    named = source.get("checkpoint") if isinstance(source, dict) else None
    if not isinstance(named, str):
        return "CHECKPOINT"
    kind, _, family = named.partition(":")
    random = kind == "random" and family in get_args(Family)
    variant = source.get("variant") if isinstance(source, dict) else None
    option = f" --variant {quoted(variant)}" if isinstance(variant, str) and variant else ""
    return f"--random-weights {family}" if random else quoted(named) + option


def check_profile(
    profile: Profile,
    architecture: Architecture,
    feature: Feature | None = None,
    streaming: Streaming | None = None,
) -> None:
    """Raises SettingsError when a bundle cannot hold `profile`, with reuse of `feature` and a streamed
    decoder: see `bounds`."""
    try:
        TypeAdapter(Profile).validate_json(json.dumps(asdict(profile)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what, expected = f"{first['loc'][0]} of a profile", first["msg"].removeprefix("Input should be ")
        raise SettingsError(
            what, expected=expected, got=repr(first["input"]), remedy="Pass a value in this range."
        ) from error
    if fault := too_large(profile, architecture, feature, streaming):
        raise SettingsError(
            "profile",
            expected="a video that a bundle may hold",
            got=fault,
            remedy="Export fewer or smaller frames, or a smaller batch.",
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two equal keys they take.  Raises ValueError."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return fields
