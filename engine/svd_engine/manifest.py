"""The manifest of a bundle: its schema, and how it is read.  Knows no other file.

Strict: a field that is not in the schema, or of another type, is refused, so that a number never means
something else to another reader.  `format` changes when a reader of the old one would be wrong.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, model_validator

from svd_engine.errors import BundleError
from svd_engine.model import Model
from svd_engine.networks.spec import Architecture, NetworkSpec, Profile
from svd_engine.random_weights import Family

FORMAT: Literal[2] = 2
MANIFEST = "manifest.json"
SCHEMA = "manifest.schema.json"
DType = Literal["float32", "float16", "bfloat16"]
Runtime = Literal["onnxruntime", "tensorrt"]  # that a graph is for; tensorrt: of either flavour
HardwareCompatibility = Literal["none", "same-cc", "ampere+"]
DTYPE_OPTIONS: dict[DType, str] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    bytes: int
    sha256: str


class Source(_Strict):
    checkpoint: str  # as the user named it
    digest: str  # Checkpoint.digest(): sha256 over its weights and configs


class NetworkEntry(_Strict):
    spec: NetworkSpec
    dtype: DType  # of weights and activations; the boundary is float32
    graphs: Annotated[dict[Runtime, str], Field(min_length=1)]  # file names; the same function, same weights
    weights: str  # file name


class RewriteEntry(_Strict):
    network: str
    name: str
    places: int
    left_alone: tuple[str, ...] = ()


class ParityEntry(_Strict):
    """One network of this bundle against eager torch in float32, same weights, same inputs."""

    network: str  # key
    backend: str
    max_abs: float
    relative: float  # max_abs over the largest absolute value of the reference
    cosine: float
    tolerance: PositiveFloat  # on `relative`


class CompiledFigures(_Strict):
    """What TensorRT's compiler made of one network, one call of it; `svd-bench compiled` says how counted."""

    kernels: int
    read_bytes: int  # over all kernels, each tensor that one takes at its full size, weights included
    written_bytes: int
    activation_bytes: int  # memory beside the weights
    weights_bytes: int


class PlanEntry(_Strict):
    """A TensorRT engine of one network, and all that decides where it runs; see `plans`."""

    network: str  # key
    file: str  # name; its size and sha256 stand in `files`
    tensorrt: str  # version that built it; no other reads it
    gpu: str  # name of the card that it was built on
    compute_capability: tuple[int, int]
    hardware_compatibility: HardwareCompatibility
    dtype: DType  # of weights and activations; the boundary is float32
    graph_sha256: str  # of the ONNX graph and weights that it was built from
    weights_sha256: str
    stripped: bool  # it holds no weights: they come from the network's weights file when it is loaded
    refittable: bool  # its weights can be replaced
    optimization_level: int
    workspace_bytes: int  # limit that the builder had
    device_memory_bytes: int  # activations of one execution context


class Manifest(_Strict):
    format: Literal[2] = FORMAT
    model: Model
    source: Source
    dtype: DType
    opset: int
    profiles: Annotated[tuple[Profile, ...], Field(min_length=1)]
    networks: tuple[NetworkEntry, ...]
    files: dict[str, FileEntry]
    rewrites: tuple[RewriteEntry, ...] = ()
    without_rewrites: tuple[str, ...] = ()
    versions: dict[str, str]
    parity: tuple[ParityEntry, ...] = ()
    plans: tuple[PlanEntry, ...] = ()

    @model_validator(mode="after")
    def _shapes_are_positive(self) -> Self:
        everything: tuple[Profile | Architecture, ...] = (*self.profiles, self.model.architecture)
        for shapes in everything:
            if any(isinstance(value, int) and value < 1 for value in astuple(shapes)):
                raise ValueError(f"a number below 1 in {shapes}")
        return self

    @property
    def random_family(self) -> Family | None:
        """Whose architecture it has, when made by `checkpoint.random_checkpoint`: the source says so."""
        names: dict[str, Family] = {f"random:{family}": family for family in get_args(Family)}
        return names.get(self.source.checkpoint)

    @property
    def export_source(self) -> str:
        """The argument by which `svd-export onnx` finds the bundle's checkpoint again."""
        if self.random_family:
            return f"--random-weights {self.random_family}"
        return shlex.quote(self.source.checkpoint)


def read_manifest(folder: Path) -> Manifest:
    """Raises BundleError when there is none, or one of another format or against the schema."""
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"bundle {folder}",
            expected=f"a folder with {MANIFEST}",
            got="no such file" if folder.is_dir() else "no such folder",
            remedy="Make one with: svd-export onnx CHECKPOINT -o BUNDLE",
        )
    try:
        content = path.read_bytes()
        document = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            str(path), expected="a JSON document", got=str(error), remedy="Export the bundle again."
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        raise BundleError(
            str(path),
            expected=f"bundle format {FORMAT}",
            got=f"format {version}",
            remedy="Export the bundle again with this version of svd-engine, or use the one that made it.",
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
