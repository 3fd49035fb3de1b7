"""What this machine can run, and what a bundle is.  Reports; changes nothing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from svd_engine import report
from svd_engine.backends.choose import without_plans
from svd_engine.backends.onnxruntime import load_runtime
from svd_engine.backends.registry import PLAN_BACKENDS
from svd_engine.backends.tensorrt.jit import invalidity
from svd_engine.backends.tensorrt.library import host, library, log, require
from svd_engine.bundle.flavours import FLAVOURS, Flavour, Host, sm
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.plans import build_command, misfit
from svd_engine.bundle.reading import Bundle
from svd_engine.checkpoint.lora import Fused
from svd_engine.checkpoint.opening import Checkpoint
from svd_engine.checkpoint.parts import Assembled
from svd_engine.checkpoint.single_file import SingleFile
from svd_engine.errors import BackendError, BackendUnavailable, BundleError
from svd_engine.spec.model import Model
from svd_engine.spec.precision import FLOAT32, Precision
from svd_engine.spec.weights import COMPONENTS, LoraFile, WeightFile

COMPILERS = {  # torch.compile's own choice, and how it is had
    "win32": ("cl", "install Visual Studio's C++ build tools"),
    "darwin": ("clang++", "run `xcode-select --install`"),
}
CUDA_BUILDS = {  # where `pip install torch` brings none
    "win32": "choose a CUDA build at https://pytorch.org/get-started/locally/",
    "darwin": "there is none for macOS",
}


@dataclass(frozen=True)
class Ability:
    """Whether one backend can work on one device here; `why_not` is empty when it can."""

    backend: str
    device: str
    why_not: str


def gpus() -> list[str]:
    """Name, memory and compute capability of every CUDA GPU that torch can use."""
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        found.append(f"{card.name}, {card.total_memory / 2**30:.1f} GiB, {sm((card.major, card.minor))}")
    return found


def abilities() -> list[Ability]:
    """Every backend on every kind of device, whatever it would run."""
    return [*torch_abilities(), *bundle_abilities(FLOAT32), *plan_abilities()]


def torch_abilities() -> list[Ability]:
    """The backends that can run a checkpoint."""
    cuda = "" if torch.cuda.is_available() else _no_gpu()
    return [
        Ability("eager", "cpu", ""),
        Ability("eager", "cuda", cuda),
        Ability("compiled", "cpu", _no_compiler()),
        Ability("compiled", "cuda", cuda),
    ]


def bundle_abilities(precision: Precision) -> list[Ability]:
    """The backends that can run a bundle of this precision."""
    rows = []
    for device in ("cpu", "cuda"):
        try:
            load_runtime(torch.device(device))
            why_not = "" if device == "cpu" or torch.cuda.is_available() else _no_gpu()
            if device == "cpu" and precision.activations == "bfloat16":
                why_not = "ONNX Runtime computes no bfloat16 on the CPU: export the bundle in fp32"
        except BackendError as error:
            why_not = str(error)
        rows.append(Ability("onnxruntime", device, why_not))
    return rows


def plan_abilities(bundle: Bundle | None = None) -> list[Ability]:
    """Whether each flavour of TensorRT can run every network of a bundle, or anything at all."""
    return [Ability(row.name, "cuda", _no_plans(row.flavour, bundle)) for row in PLAN_BACKENDS if row.flavour]


def _no_plans(flavour: Flavour, bundle: Bundle | None) -> str:
    why_not = "" if torch.cuda.is_available() else _no_gpu()
    try:
        require(flavour)
    except BackendUnavailable as error:
        why_not = str(error)
    if why_not or bundle is None:
        return why_not
    return without_plans(bundle, torch.device("cuda", 0), flavour)


def plan_facts(bundle: Bundle) -> dict[str, str]:
    """Every TensorRT plan: what it is, for which profiles, and which GPU here runs it, or why none does."""
    made_by = {plan.flavour for plan in bundle.manifest.plans}
    hosts = {name: _hosts(FLAVOURS[name]) for name in made_by}
    facts = {}
    for number, plan in enumerate(bundle.manifest.plans, 1):
        here, nowhere = hosts[plan.flavour]
        facts[f"plan {number}"] = f"{_plan(bundle, plan)}; {nowhere or _where(bundle, plan, here)}"
    return facts


def _hosts(flavour: Flavour) -> tuple[dict[str, Host], str]:
    """The GPUs here that a flavour could use, by torch's name; or why there is none, and what to run."""
    if not torch.cuda.device_count():
        return {}, "not here: torch sees no CUDA GPU"
    try:
        indices = range(torch.cuda.device_count())
        return {f"cuda:{index}": host(flavour, torch.device("cuda", index)) for index in indices}, ""
    except BackendUnavailable as error:
        return {}, f"not here: {flavour.name}: {error.got}; run: {flavour.install}"


def _plan(bundle: Bundle, plan: PlanEntry) -> str:
    manifest = bundle.manifest
    keys = [{spec.key for spec in bundle.specs_of(profile)} for profile in manifest.profiles]
    profiles = ", ".join(str(number) for number, of_one in enumerate(keys, 1) if plan.network in of_one)
    target = plan.target
    only = f"{target.gpu} only, " if target.gpu else f"{target.label}: " if target.label == "portable" else ""
    compiled = plan.compiled
    weights = f"{compiled.weights_bytes / 2**20:.1f} MiB of weights and " if compiled else ""
    moved = compiled.read_bytes + compiled.written_bytes if compiled else 0
    inside = " without weights" if plan.stripped else ""
    inside += ", weights that can stream" if plan.least_weight_bytes is not None else ""
    kernels = f", {compiled.kernels} kernels that move {report.size(moved)}" if compiled else ""
    return (
        f"{plan.network} (profile {profiles}), {FLAVOURS[plan.flavour].title} {plan.version}, "
        f"for {only}{target.cards}, {plan.precision}, "
        f"{manifest.files[plan.file].bytes / 2**20:.1f} MiB{inside}, "
        f"on the GPU {weights}{plan.device_memory_bytes / 2**20:.1f} MiB of activations{kernels}"
    )


def _where(bundle: Bundle, plan: PlanEntry, hosts: dict[str, Host]) -> str:
    spec = bundle.spec(plan)
    reasons = {
        name: misfit(bundle, spec, plan, here) or _refused_by_library(bundle, plan, name)
        for name, here in hosts.items()
    }
    fitting = [name for name, reason in reasons.items() if not reason]
    if fitting:
        return f"runs on {', '.join(fitting)}"
    why_not = "; ".join(dict.fromkeys(reasons.values()))
    return f"not here: {why_not}; run: {build_command(bundle, next(iter(hosts.values())))}"


def _refused_by_library(bundle: Bundle, plan: PlanEntry, device: str) -> str:
    """What the library itself says of a plan on a GPU; only TensorRT for RTX has a word on that."""
    flavour = FLAVOURS[plan.flavour]
    if not flavour.compiles_at_first_launch:
        return ""
    with torch.cuda.device(device):
        try:
            return invalidity(library(flavour).Runtime(log(flavour)), bundle.read_plan(plan))
        except TypeError:  # how its bindings say that the library gave no runtime
            return str(log(flavour).errors_so_far())
        except BundleError as error:
            return f"{error.what}: {error.remedy}"


def bundle_facts(bundle: Bundle) -> dict[str, str]:
    """What a person wants to know of a bundle, in the order in which they ask."""
    manifest = bundle.manifest
    model, source = manifest.model, manifest.source
    size = sum(entry.bytes for entry in manifest.files.values())
    facts = {
        "model": f"{model.name}{' with random weights' if model.random_weights else ''}",
        "family": _family(model),
        "made from": f"{source.checkpoint}{f', variant {source.variant}' if source.variant else ''}",
        **{f"{component} from": path for component, path in source.parts.items()},
        **_lora_facts(source.lora),
        **_weights_facts(source.weights),
        "precision": str(manifest.precision),
        "size": f"{size / 2**20:.1f} MiB in {len(manifest.files)} files, ONNX opset {manifest.opset}",
    }
    for number, profile in enumerate(manifest.profiles, 1):
        facts[f"profile {number}"] = str(profile)
    if (reused := manifest.reuse) is not None:
        facts["reuse"] = f"a full and a shallow denoiser, branch {reused.branch}"
    if (streamed := manifest.streaming) is not None:
        facts["streamed decoder"] = f"{streamed.slice_frames} frames at a time"
    facts["rewrites"] = ", ".join(sorted({r.name for r in manifest.rewrites if r.places})) or "none"
    if manifest.without_rewrites:
        facts["without"] = ", ".join(manifest.without_rewrites)
    worst = max(manifest.parity, key=lambda row: row.relative / row.tolerance, default=None)
    facts["parity"] = (
        f"worst {worst.relative:.2g} of {worst.tolerance:g} allowed ({worst.network}, {worst.backend})"
        if worst
        else f"not verified; run: svd-export verify {bundle.folder}"
    )
    facts["made with"] = ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
    return facts


def checkpoint_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What it is, its parts, their sizes and precision, off the headers alone; from the hub it is fetched."""
    model = checkpoint.model
    weights = checkpoint.weights
    while isinstance(weights, (Assembled, Fused)):
        weights = weights.base
    single = weights if isinstance(weights, SingleFile) else None
    facts = {
        "model": f"{model.name}, {model.frames} frames of {model.height}x{model.width}",
        "family": _family(model, image_decoder=checkpoint.configs["vae"]["_class_name"] == "AutoencoderKL"),
        "layout": "one file, Stability's names" if single else "diffusers folder",
    }
    facts |= {f"{component} from": source for component, source in checkpoint.parts.items()}
    facts |= _lora_facts(checkpoint.lora)
    for component in COMPONENTS:
        stated = checkpoint.weights.stated(component)
        parameters = sum(prod(one.shape) for one in stated)
        kinds = " and ".join(sorted({one.dtype for one in stated}))
        facts[component] = f"{len(stated)} tensors, {parameters / 1e6:.1f} M parameters, {kinds}"
    if single and (left := single.not_read()):
        facts["not read"] = ", ".join(f"{what} ({count})" for what, count in list(left.items())[:10])
    return facts


def _family(model: Model, image_decoder: bool = False) -> str:
    told = ", ".join(model.architecture.conditioning.names)
    return f"{model.family}, told {told}{'; each frame is decoded as an image' if image_decoder else ''}"


def _lora_facts(files: Iterable[LoraFile]) -> dict[str, str]:
    return {
        f"LoRA {number}": f"{one.file}, scale {one.scale:g}, {one.fused} weights, {one.left} keys left out"
        for number, one in enumerate(files, 1)
    }


def file_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """Which weight files are read; hashes them, which takes a while for large ones."""
    files = [file for part in COMPONENTS for file in checkpoint.weight_files(part)]
    return {**_weights_facts(files), "digest": checkpoint.digest()}


def _weights_facts(files: Iterable[WeightFile]) -> dict[str, str]:
    """The files that a checkpoint's weights were read from, a line each."""
    return {
        f"weights {number}": f"{file.component}/{file.file}, {file.bytes} bytes, sha256 {file.sha256}"
        for number, file in enumerate(files, 1)
    }


def machine_facts() -> dict[str, str]:
    facts = {f"GPU {index}": card for index, card in enumerate(gpus())} or {"GPU": _no_gpu()}
    return {**facts, **report.versions()}


def _no_compiler() -> str:
    usual, how = COMPILERS.get(sys.platform, ("g++", "run apt-get install g++"))
    name = os.environ.get("CXX", usual)
    return "" if shutil.which(name) else f"no C++ compiler {name}: {how}, or set CXX"


def _no_gpu() -> str:
    if torch.version.cuda is None:
        install = CUDA_BUILDS.get(sys.platform, "run `pip install --force-reinstall torch`")
        return f"none usable: torch {torch.__version__} is built without CUDA ({install})"
    return "none found by torch: check the NVIDIA driver with nvidia-smi"
