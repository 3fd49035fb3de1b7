"""The bundle: a folder that stands alone.  Reads and checks it, refuses with the remedy, builds nothing.

    manifest.json             everything about it; `manifest.Manifest` is its schema
    manifest.schema.json      the same schema for readers in other languages
    <network key>.onnx        one graph per network and static shape, as ONNX Runtime wants it
    <network key>.tensorrt.onnx   the same network as TensorRT wants it; half precision only
    <network>.bin             that network's weights, shared by all its graphs; one for all denoisers, and
                              one for the decoder, whole and streamed
    <network key>.*.plan      a TensorRT engine of one graph, for one machine; `plans` knows which

The manifest is read when a bundle is opened; the files of a network are hashed before they are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PureWindowsPath

from svd_engine.bundle.external_data import check_external_data, read_graph
from svd_engine.bundle.flavours import FlavourName
from svd_engine.bundle.graph_limits import check_limits
from svd_engine.bundle.manifest import (
    MANIFEST,
    NetworkEntry,
    PlanEntry,
    Runtime,
    export_command,
    read_manifest,
)
from svd_engine.errors import BundleError, ProfileError
from svd_engine.request import SETTINGS, Settings
from svd_engine.shell import quoted
from svd_engine.spec.profile import Profile
from svd_engine.spec.reuse import Feature, Reuse, reusing_specs
from svd_engine.spec.streaming import segments_of
from svd_engine.spec.tables import NETWORKS, segments, specs_of
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec

ABSENT = "no such file"
DEFAULT_SLICE = 2  # frames of a streamed decoder at a time, where nobody says
COPY_AGAIN = "Copy the whole bundle again, links resolved, or export it again."
RUNTIME_NAMES: dict[Runtime, str] = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}


class Bundle:
    """An opened bundle.  Raises BundleError when the folder is not a whole bundle of this format."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._entries = {entry.spec.key: entry for entry in self.manifest.networks}
        self._hashed: set[str] = set()
        plans = {plan.file for plan in self.manifest.plans}
        for name in self.manifest.files:
            _check_inside(self.folder, name)
            if name not in plans:  # a plan is only one way to run the bundle, and is built again
                self._check_whole(name)
        self._check_conditioning()
        self._check_complete()

    def profile_for(self, settings: Settings) -> Profile:
        """The profile that does this call, see `Profile.of_bundle`.

        Raises ProfileError that names what there is and the export command that would do it.
        """
        found = Profile.of_bundle(self.profiles(settings), settings)
        if found is None:
            s, chunk = settings, settings.decode_chunk_size
            decoded = f" and decode chunk {chunk}" if chunk else ""
            decoded += ", decoded whole" if s.decoding == "whole" else ""
            flag = f" --decode-chunk {chunk}" if chunk else ""
            raise ProfileError(
                f"bundle {self.folder}",
                expected=f"one of its profiles ({'; '.join(map(str, self.manifest.profiles))})",
                got=f"{s.frames} frames of {s.height}x{s.width}{decoded}",
                remedy=f"Ask for one of these, or run: svd-export onnx {self.manifest.export_source} "
                f"-o NEW_BUNDLE --frames {s.frames} --height {s.height} --width {s.width}{flag}"
                f"{self._reuse_option()}{self._stream_option(frames=s.frames)} "
                f"--dtype {self.manifest.precision.option}",
            )
        return found

    def profiles(self, settings: Settings) -> list[Profile]:
        """Those that a call chooses from; with a streamed decoder, which takes all frames, as it needs them.

        Raises ProfileError where a streamed decoder is asked for, and the bundle has none like that.
        """
        if self.slice_frames(settings) is None:
            return list(self.manifest.profiles)
        return list(dict.fromkeys(replace(p, decode_chunk=p.frames) for p in self.manifest.profiles))

    def slice_frames(self, settings: Settings) -> int | None:
        """Frames that the streamed decoder takes at a time; None for a call that asks for none.

        Raises ProfileError for a bundle without one, and for another number of frames.
        """
        if settings.decoding != "streamed":
            return None
        streaming, asked = self.manifest.streaming, settings.decode_chunk_size
        if streaming is not None and asked in (None, streaming.slice_frames):
            return streaming.slice_frames
        raise ProfileError(
            f"streamed decoder of bundle {self.folder}",
            expected=f"decode_chunk_size={streaming.slice_frames}, which it was exported with"
            if streaming
            else "a bundle with one",
            got=f"decode_chunk_size={asked}" if streaming else "decoders of whole chunks alone",
            remedy=self._stream_remedy(asked),
        )

    def _stream_remedy(self, asked: int | None) -> str:
        """asked: frames that a streamed decoder shall take at a time, and the bundle has none that does."""
        shortest = min(profile.frames for profile in self.manifest.profiles)
        dtype = f"--dtype {self.manifest.precision.option}"
        command = self._export_command(dtype, size=asked or DEFAULT_SLICE)
        if self.manifest.streaming is not None:
            possible = asked is not None and asked < shortest
            return f"Leave out decode_chunk_size{f', or run: {command}' if possible else '.'}"
        if self.manifest.model.orbits:
            return "Leave it out: each frame of this model is decoded alone, so chunks make the same video."
        return f"Run: {command}" if shortest > 1 else "Leave it out: one frame has nothing to stream."

    def single_profile_for(self, settings: Settings) -> Profile:
        """As `profile_for`, one half of guidance a call.  Raises ProfileError where there is none."""
        profile = replace(self.profile_for(settings), guidance="single")
        if profile not in self.profiles(settings):
            dtype = f"--dtype {self.manifest.precision.option}"
            changes = f"{self._stream_option()} {dtype}".lstrip()
            raise ProfileError(
                f"bundle {self.folder} on two devices",
                expected="a profile of single guidance, one half a call",
                got="; ".join(map(str, self.manifest.profiles)),
                remedy=f"Run: {export_command(self.manifest.export_source, [profile], changes)}",
            )
        return profile

    def specs_of(self, profile: Profile) -> list[NetworkSpec]:
        """Every network of `profile`, in the bundle's precision: those of a plain call in its order, then the
        full and the shallow denoiser of a bundle with reuse, then the segments of a streamed decoder."""
        manifest = self.manifest
        of = profile, manifest.model.architecture, manifest.precision
        specs = specs_of(*of)
        return [
            *specs,
            *(reusing_specs(specs[2], manifest.reuse) if manifest.reuse else ()),
            *(segments(*of, manifest.streaming) if manifest.streaming else ()),
        ]

    def segments(self, decoder: StreamedSpec) -> tuple[NetworkSpec, ...]:
        """The networks of a streamed decoder of this bundle, in its order."""
        assert self.manifest.streaming is not None  # `slice_frames` has refused a call without
        return segments_of(decoder, self.manifest.streaming)

    def feature(self, reuse: Reuse) -> Feature:
        """What the bundle's denoisers reuse.  Raises ProfileError where it is nothing or another branch's."""
        feature, branch = self.manifest.reuse, reuse.branch
        if feature is not None and branch in (None, feature.branch):
            return feature
        command = self._export_command(f"--dtype {self.manifest.precision.option}", branch or 0)
        raise ProfileError(
            f"reuse with bundle {self.folder}",
            expected=f"branch {feature.branch}, which it was exported with"
            if feature
            else "a bundle with a full and a shallow denoiser",
            got=f"branch {branch}" if feature else "the plain one alone",
            remedy=f"Leave out the branch, or run: {command}" if feature else f"Run: {command}",
        )

    def entries(self, networks: Collection[str] | None = None) -> list[NetworkEntry]:
        """Of networks by name ("denoiser"); None is all.  Raises ProfileError for one that is not there."""
        held = {entry.spec.network for entry in self.manifest.networks}
        if missing := [name for name in networks or () if name not in held]:
            raise ProfileError(
                f"networks of bundle {self.folder}",
                expected=f"some of {', '.join(name for name in NETWORKS if name in held)}",
                got=", ".join(missing),
                remedy="Ask for these; `svd-export onnx CHECKPOINT -o BUNDLE --reuse-branch 0` exports a "
                "shallow denoiser, `svd-export onnx CHECKPOINT -o BUNDLE --stream-decoder 2` segments.",
            )
        return [e for e in self.manifest.networks if networks is None or e.spec.network in networks]

    def entry(self, spec: NetworkSpec) -> NetworkEntry:
        """Raises BundleError when the manifest's table differs from `spec`."""
        entry = self._entries.get(spec.key)
        if entry is None or entry.spec != spec:
            raise BundleError(
                f"network {spec.key} of bundle {self.folder}",
                expected=_described(spec),
                got=_described(entry.spec) if entry else f"only {', '.join(self._entries)}",
                remedy="Export the bundle again with this version of svd-engine.",
            )
        return entry

    def graph(self, spec: NetworkSpec, runtime: Runtime, memory: int | None = None) -> Path:
        """Path of the network's ONNX graph for `runtime`, checked for all that can be known before.

        Its files' hashes, where its weights lie, its inputs and output, and what it allocates: no run of it
        may need more than `memory` bytes; None leaves that to the runtime.  Raises BundleError, also when
        the bundle holds no graph for that runtime.
        """
        entry = self.entry(spec)
        graph = self.graph_name(spec, runtime)
        for name in (graph, entry.weights):
            self._check_hash(name)
        path = self.folder / graph
        model = read_graph(path)
        check_external_data(path, model, entry.weights)
        check_limits(path, model, spec, self.manifest.files[entry.weights].bytes, memory)
        return path

    def graph_name(self, spec: NetworkSpec, runtime: Runtime) -> str:
        """File name of the graph for `runtime`.  Raises BundleError when there is none."""
        graphs = self.entry(spec).graphs
        if runtime not in graphs:
            raise BundleError(
                f"bundle {self.folder}, {self.manifest.precision}",
                expected=f"graphs for {RUNTIME_NAMES[runtime]}, which bundles in half precision hold",
                got=f"only for {', '.join(RUNTIME_NAMES[held] for held in graphs)}",
                remedy=f"Run: {self._export_command('--dtype fp16')}",
            )
        return graphs[runtime]

    def plans_command(self, flavour: FlavourName | None = None, stream_weights: bool = False) -> str:
        """The command that builds plans here; without graphs for them, the export that makes these."""
        if not all("tensorrt" in entry.graphs for entry in self.manifest.networks):
            return self._export_command("--dtype fp16")
        option = f" --flavour {flavour}" if flavour else ""
        option += " --stream-weights" if stream_weights else ""
        return f"svd-export tensorrt {quoted(self.folder)}{option}"

    def _export_command(self, changes: str, branch: int | None = None, size: int | None = None) -> str:
        """Makes this bundle again with `changes`, with reuse of another `branch`, or with a decoder streamed
        in slices of another `size`."""
        changes = f"{self._reuse_option(branch)}{self._stream_option(size)} {changes}".lstrip()
        return export_command(self.manifest.export_source, self.manifest.profiles, changes)

    def _reuse_option(self, branch: int | None = None) -> str:
        """Of the export: for `branch`, or else for what the bundle has; empty for no reuse."""
        own = self.manifest.reuse
        branch = own.branch if branch is None and own else branch
        return "" if branch is None else f" --reuse-branch {branch}"

    def _stream_option(self, size: int | None = None, frames: int | None = None) -> str:
        """Of the export: for slices of `size`, or else for what the bundle has; empty for none.

        A slice is shorter than a video of `frames`, or else than those of the bundle.
        """
        own = self.manifest.streaming
        size = own.slice_frames if size is None and own else size
        shortest = min(p.frames for p in self.manifest.profiles) if frames is None else frames
        size = min(size or 0, shortest - 1)
        return f" --stream-decoder {size}" if size else ""

    def plans(self, spec: NetworkSpec) -> list[PlanEntry]:
        """The TensorRT plans of a network, for whatever machine."""
        return [plan for plan in self.manifest.plans if plan.network == spec.key]

    def spec(self, plan: PlanEntry) -> NetworkSpec:
        """The table of the network that a plan runs."""
        return self._entries[plan.network].spec

    def read_plan(self, plan: PlanEntry) -> bytes:
        """The content of a plan.  A plan is code, so these very bytes are what was hashed.

        Raises BundleError when they are not what the manifest says.
        """
        self._check_whole(plan.file)
        content = (self.folder / plan.file).read_bytes()
        self._compare(plan.file, hashlib.sha256(content).hexdigest())
        return content

    def damage(self, name: str) -> str:
        """Whether a listed file is missing or of another size, in words; empty when not."""
        path, expected = self.folder / name, self.manifest.files[name].bytes
        if not path.is_file():
            return ABSENT
        size = path.stat().st_size
        return f"{size} bytes" if size != expected else ""

    def digest(self) -> str:
        """sha256 over what decides the frames: the model, the profiles, and the networks' tables and files.

        Not over plans and results of verification, which come later, nor over where the weights came from.
        """
        decides = {"model", "precision", "profiles", "reuse", "streaming", "networks"}
        told = self.manifest.model_dump(mode="json", include=decides, exclude={"model": {"name"}})
        plans = {plan.file for plan in self.manifest.plans}
        hashes = {name: file.sha256 for name, file in self.manifest.files.items() if name not in plans}
        return hashlib.sha256(json.dumps([told, hashes], sort_keys=True).encode()).hexdigest()

    def check_hashes(self) -> None:
        """Hashes every file.  Raises BundleError for the first that differs."""
        for name in self.manifest.files:
            self._check_hash(name)

    def _check_hash(self, name: str) -> None:
        if name in self._hashed:
            return
        self._check_whole(name)
        self._compare(name, sha256_of(self.folder / name))
        self._hashed.add(name)

    def _compare(self, name: str, got: str) -> None:
        expected = self.manifest.files[name].sha256
        if got != expected:
            raise BundleError(
                f"file {name} of bundle {self.folder}",
                expected=f"sha256 {expected}",
                got=f"sha256 {got}",
                remedy=self._rebuild(name)
                or "The file was altered or damaged: copy or export the bundle again.",
            )

    def _check_whole(self, name: str) -> None:
        if got := self.damage(name):
            raise BundleError(
                f"file {name} of bundle {self.folder}",
                expected=f"a regular file inside the bundle of {self.manifest.files[name].bytes} bytes",
                got=got,
                remedy=self._rebuild(name) or COPY_AGAIN,
            )

    def _rebuild(self, name: str) -> str:
        """The remedy for a damaged plan; empty for another file."""
        flavour = next((plan.flavour for plan in self.manifest.plans if plan.file == name), None)
        return f"The plan was altered or damaged. Run: {self.plans_command(flavour)}" if flavour else ""

    def _check_conditioning(self) -> None:
        known = {parameter.field for parameter in SETTINGS}
        told = [field.name for field in self.manifest.model.architecture.conditioning.fields]
        if unknown := [name for name in told if name not in known or told.count(name) > 1]:
            raise BundleError(
                f"conditioning in {self.folder / MANIFEST}",
                expected="parameters of a call, each once",
                got=", ".join(unknown),
                remedy="Export the bundle again, or use the version that exported it.",
            )

    def _check_complete(self) -> None:
        for profile in self.manifest.profiles:
            for spec in self.specs_of(profile):
                entry = self.entry(spec)
                self._check_listed(f"network {spec.key}", *entry.graphs.values(), entry.weights)
        for plan in self.manifest.plans:
            self._check_listed(f"plan {plan.file}", plan.file)
            if plan.network not in self._entries:
                raise BundleError(
                    f"plan {plan.file} in {self.folder / MANIFEST}",
                    expected=f"one of the bundle's networks ({', '.join(self._entries)})",
                    got=plan.network,
                    remedy="Export the bundle again.",
                )

    def _check_listed(self, what: str, *names: str) -> None:
        unlisted = set(names) - self.manifest.files.keys()
        if unlisted:
            raise BundleError(
                f"{what} in {self.folder / MANIFEST}",
                expected="files that the manifest lists with their hash",
                got=f"{', '.join(sorted(unlisted))} without one",
                remedy="Export the bundle again.",
            )


def _described(spec: NetworkSpec) -> str:
    """A table, and what its tensors do not say."""
    kept = f"{spec.kept} resnets kept" if spec.kept else None
    segment = None if spec.segment is None else f"segment {spec.segment}"
    return ", ".join(filter(None, (spec.table, str(spec.precision), spec.guidance, kept, segment)))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_inside(folder: Path, name: str) -> None:
    link = (folder / name).is_symlink()
    if link or PureWindowsPath(name).name != name:  # of both kinds of separator, and drives
        raise BundleError(
            f"file {name} of bundle {folder}",
            expected="a regular file inside the bundle",
            got="a link" if link else "a path that leaves the bundle",
            remedy=COPY_AGAIN,
        )
