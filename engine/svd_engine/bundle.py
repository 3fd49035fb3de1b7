"""The bundle: a folder that stands alone.  Reads and checks it, refuses with the remedy, builds nothing.

    manifest.json             everything about it; `Manifest` below is its schema
    manifest.schema.json      the same schema for readers in other languages
    <network key>.onnx        one graph per network and static shape
    <network>.bin             that network's weights, shared by all its graphs

The manifest is read when a bundle is opened; the files of a network are hashed before they are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from svd_engine.errors import BackendUnavailable, BundleError, ProfileError
from svd_engine.model import Model
from svd_engine.networks.spec import Guidance, NetworkSpec, Profile, specs_of

FORMAT = 1
MANIFEST = "manifest.json"
SCHEMA = "manifest.schema.json"
DType = Literal["float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    bytes: int
    sha256: str


class Source(_Strict):
    checkpoint: str  # as the user named it
    digest: str  # Checkpoint.digest(): sha256 over its weights and configs


class NetworkEntry(_Strict):
    spec: NetworkSpec
    dtype: DType  # of weights and activations; the boundary is float32
    graph: str  # file name
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
    tolerance: float  # on `relative`


class Manifest(_Strict):
    format: Literal[1] = FORMAT
    model: Model
    source: Source
    dtype: DType
    opset: int
    profiles: tuple[Profile, ...]
    networks: tuple[NetworkEntry, ...]
    files: dict[str, FileEntry]
    rewrites: tuple[RewriteEntry, ...] = ()
    without_rewrites: tuple[str, ...] = ()
    versions: dict[str, str]
    parity: tuple[ParityEntry, ...] = ()


class Bundle:
    """An opened bundle.  Raises BundleError when the folder is not a whole bundle of this format."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self._entries = {entry.spec.key: entry for entry in self.manifest.networks}
        self._hashed: set[str] = set()
        for name, entry in self.manifest.files.items():
            _check_present(self.folder, name, entry)
        self._check_complete()

    def profile_for(
        self, *, frames: int, height: int, width: int, decode_chunk: int | None, guided: bool
    ) -> Profile:
        """The profile that does this call.  `decode_chunk` None takes any; `guided` prefers `batched`.

        Raises ProfileError that names what there is and the export command that would do it.
        """
        fitting = [
            p
            for p in self.manifest.profiles
            if (p.frames, p.height, p.width) == (frames, height, width) and decode_chunk in (None, p.decode_chunk)
        ]
        if not fitting:
            chunk = f" and decode chunk {decode_chunk}" if decode_chunk else ""
            flag = f" --decode-chunk {decode_chunk}" if decode_chunk else ""
            raise ProfileError(
                f"bundle {self.folder}",
                expected=f"one of its profiles ({'; '.join(map(str, self.manifest.profiles))})",
                got=f"{frames} frames of {height}x{width}{chunk}",
                remedy=f"Ask for one of these, or run: svd-export onnx {self.manifest.source.checkpoint} "
                f"-o NEW_BUNDLE --frames {frames} --height {height} --width {width}{flag}",
            )
        wanted: Guidance = "batched" if guided else "single"
        return min(fitting, key=lambda p: p.guidance != wanted)

    def entry(self, spec: NetworkSpec) -> NetworkEntry:
        """Raises BundleError when the manifest's table differs from `spec`."""
        entry = self._entries.get(spec.key)
        if entry is None or entry.spec != spec:
            raise BundleError(
                f"network {spec.key} of bundle {self.folder}",
                expected=f"{', '.join(map(str, spec.inputs))} -> {spec.output}",
                got=str(entry.spec) if entry else f"only {', '.join(self._entries)}",
                remedy="Export the bundle again with this version of svd-engine.",
            )
        return entry

    def dtype_of(self, spec: NetworkSpec) -> str:
        return self.entry(spec).dtype

    def graph(self, spec: NetworkSpec) -> Path:
        """Path of the network's ONNX graph, after its files' hashes and its weight paths are checked."""
        entry = self.entry(spec)
        for name in (entry.graph, entry.weights):
            self._check_hash(name)
        _check_external_data(self.folder / entry.graph, entry.weights)
        return self.folder / entry.graph

    def check_hashes(self) -> None:
        """Hashes every file.  Raises BundleError for the first that differs."""
        for name in self.manifest.files:
            self._check_hash(name)

    def _check_hash(self, name: str) -> None:
        if name in self._hashed:
            return
        expected, got = self.manifest.files[name].sha256, sha256_of(self.folder / name)
        if got != expected:
            raise BundleError(
                f"file {name} of bundle {self.folder}",
                expected=f"sha256 {expected}",
                got=f"sha256 {got}",
                remedy="The file was altered or damaged: copy or export the bundle again.",
            )
        self._hashed.add(name)

    def _check_complete(self) -> None:
        for profile in self.manifest.profiles:
            for spec in specs_of(profile, self.manifest.model.architecture):
                entry = self.entry(spec)
                unlisted = {entry.graph, entry.weights} - self.manifest.files.keys()
                if unlisted:
                    raise BundleError(
                        f"network {spec.key} in {self.folder / MANIFEST}",
                        expected="files that the manifest lists with their hash",
                        got=f"{', '.join(sorted(unlisted))} without one",
                        remedy="Export the bundle again.",
                    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"bundle {folder}",
            expected=f"a folder with {MANIFEST}",
            got="no such file" if folder.is_dir() else "no such folder",
            remedy="Make one with: svd-export onnx CHECKPOINT -o BUNDLE",
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(
            str(path), expected="a JSON document", got=str(error), remedy="Export the bundle again."
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        raise BundleError(
            str(path),
            expected=f"bundle format {FORMAT}",
            got=f"format {version}",
            remedy="Export the bundle again with this version of svd-engine, or use the version that made it.",
        )
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(
            f"{path}, field {'.'.join(map(str, first['loc']))}",
            expected=f"a manifest that follows {SCHEMA}",
            got=first["msg"],
            remedy="Export the bundle again.",
        ) from error


def _check_present(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    if Path(name).name != name or path.is_symlink():
        got = "a link" if path.is_symlink() else "a path that leaves the bundle"
    elif not path.is_file():
        got = "no such file"
    elif path.stat().st_size != entry.bytes:
        got = f"{path.stat().st_size} bytes"
    else:
        return
    raise BundleError(
        f"file {name} of bundle {folder}",
        expected=f"a regular file inside the bundle of {entry.bytes} bytes",
        got=got,
        remedy="Copy the whole bundle again, links resolved, or export it again.",
    )


def _check_external_data(graph: Path, weights: str) -> None:
    """Weights may lie in the one file that the manifest names for this graph, and nowhere else."""
    try:
        import onnx
        from onnx.external_data_helper import uses_external_data
    except ImportError as error:
        raise BackendUnavailable(
            f"reading {graph.name}",
            expected="the package onnx",
            got="none installed",
            remedy="Run: pip install 'svd-engine[cpu]' (or [cuda] on a GPU)",
        ) from error
    model = onnx.load(str(graph), load_external_data=False)
    for tensor in chain(_tensors(model.graph), *map(_tensors, model.functions)):
        if not uses_external_data(tensor):
            continue
        location = {item.key: item.value for item in tensor.external_data}.get("location", "")
        if location != weights:
            raise BundleError(
                f"tensor {tensor.name} in {graph}",
                expected=f"weights in {weights}",
                got=f"a path to {location!r}",
                remedy="Do not run this bundle; export one from the checkpoint.",
            )


def _tensors(graph: Any) -> Iterator[Any]:
    """Every TensorProto of a GraphProto or FunctionProto: initializers, and those in attributes at any depth."""
    yield from getattr(graph, "initializer", ())  # a FunctionProto has none
    for node in graph.node:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _tensors(inner)
