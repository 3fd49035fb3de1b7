"""Which TensorRT plan runs where.  Knows manifests and machines; imports no torch and no tensorrt.

A plan is made for one TensorRT version, one ONNX graph and its weights, and one kind of GPU:

    hardware_compatibility   runs on
    none                     cards of the same name
    same-cc                  cards of the same compute capability
    ampere+                  every card from compute capability 8.0 on
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from svd_engine.bundle import Bundle
from svd_engine.errors import BackendUnavailable
from svd_engine.manifest import DType, HardwareCompatibility, PlanEntry
from svd_engine.networks.spec import NetworkSpec

AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What decides whether a plan runs here."""

    tensorrt: str  # version, all of it
    gpu: str  # name, as the driver gives it
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"TensorRT {self.tensorrt} on {self.gpu}, {sm(self.compute_capability)}"


def sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def plan_file(key: str, machine: Machine, compatibility: HardwareCompatibility, dtype: DType) -> str:
    """Name of a plan's file: letters, digits, dots, underscores and hyphens."""
    gpu = {"none": machine.gpu, "same-cc": sm(machine.compute_capability), "ampere+": "ampere-plus"}
    parts = (f"trt{machine.tensorrt}", gpu[compatibility], dtype)
    return f"{key}.{'-'.join(re.sub(r'[^a-z0-9._]+', '-', part.lower()).strip('-') for part in parts)}.plan"


def build_command(folder: Path) -> str:
    return f"svd-export tensorrt {shlex.quote(str(folder))}"


def misfit(bundle: Bundle, spec: NetworkSpec, plan: PlanEntry, machine: Machine) -> str:
    """What keeps a plan of `spec` from running on `machine`; empty when nothing does."""
    entry, files = bundle.entry(spec), bundle.manifest.files
    if plan.tensorrt != machine.tensorrt:
        return f"built by TensorRT {plan.tensorrt}, here is {machine.tensorrt}"
    if plan.hardware_compatibility == "none" and plan.gpu != machine.gpu:
        return f"built for {plan.gpu}, here is {machine.gpu}"
    if plan.hardware_compatibility == "ampere+":
        wanted, runs = f"{sm(AMPERE)} or newer", machine.compute_capability >= AMPERE
    else:
        wanted, runs = sm(plan.compute_capability), machine.compute_capability == plan.compute_capability
    if not runs:
        return f"built for {wanted}, here is {sm(machine.compute_capability)}"
    graph = bundle.graph_name(spec, "tensorrt")
    if plan.graph_sha256 != files[graph].sha256:
        return f"built from another {graph} than the bundle's"
    if plan.weights_sha256 != files[entry.weights].sha256:
        return f"built from another {entry.weights} than the bundle's"
    return ""


def fitting_plans(bundle: Bundle, spec: NetworkSpec, machine: Machine) -> list[PlanEntry]:
    """Those of `spec` that run on `machine`; first the one made for this very card, if there is one."""
    order: tuple[HardwareCompatibility, ...] = ("none", "same-cc", "ampere+")
    fitting = [plan for plan in bundle.plans(spec) if not misfit(bundle, spec, plan, machine)]
    return sorted(fitting, key=lambda plan: order.index(plan.hardware_compatibility))


def refusal(bundle: Bundle, spec: NetworkSpec, machine: Machine) -> str:
    """What keeps every plan of `spec` from running on `machine`; empty when one runs."""
    if fitting_plans(bundle, spec, machine):
        return ""
    reasons = {plan.file: misfit(bundle, spec, plan, machine) for plan in bundle.plans(spec)}
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items()) or "no plan"


def fitting_plan(bundle: Bundle, spec: NetworkSpec, machine: Machine) -> PlanEntry:
    """The plan that runs `spec` on `machine`.

    Raises BackendUnavailable that says for every plan why it does not fit, and what builds one that does.
    """
    if refused := refusal(bundle, spec, machine):
        raise BackendUnavailable(
            f"TensorRT plan of {spec.key} in bundle {bundle.folder}",
            expected=f"one for {machine}",
            got=refused,
            remedy=f"Run: {build_command(bundle.folder)}",
        )
    return fitting_plans(bundle, spec, machine)[0]
