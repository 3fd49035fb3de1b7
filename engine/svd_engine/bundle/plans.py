"""Which TensorRT plan runs where.  Knows manifests, targets and hosts; imports no torch and no TensorRT.

A plan is made by one flavour and version of TensorRT, from one ONNX graph and its weights, for one target.
"""

from __future__ import annotations

from svd_engine.bundle.flavours import FLAVOURS, FlavourName, Host, Target, slug
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.reading import ABSENT, Bundle
from svd_engine.errors import BackendUnavailable
from svd_engine.spec.precision import Precision
from svd_engine.spec.tensors import NetworkSpec


def plan_file(key: str, flavour: FlavourName, version: str, target: Target, precision: Precision) -> str:
    """Name of a plan's file: letters, digits, dots, underscores and hyphens."""
    parts = (f"{FLAVOURS[flavour].prefix}{version}", target.label, str(precision))
    return f"{key}.{'-'.join(map(slug, parts))}.plan"


def build_command(bundle: Bundle, host: Host) -> str:
    """What builds the plans that are missing here, of the flavour that serves the card."""
    return bundle.plans_command(_serving(host))


def build_remedy(bundle: Bundle, host: Host) -> str:
    """`build_command` as a remedy, with the backend to use when the one asked for does not serve the card."""
    command, flavour = build_command(bundle, host), _serving(host)
    return f"Run: {command}" if flavour == host.flavour else f'Run `{command}`, then use backend="{flavour}".'


def _serving(host: Host) -> FlavourName:
    """The flavour asked for, unless it is another that serves cards of this kind."""
    preferred = FLAVOURS[host.flavour].preferred
    return host.flavour if not preferred or host.compute_capability in preferred else "tensorrt"


def misfit(bundle: Bundle, spec: NetworkSpec, plan: PlanEntry, host: Host) -> str:
    """What keeps a plan of `spec` from running on `host`; empty when nothing does."""
    if plan.flavour != host.flavour:
        return f"built by {FLAVOURS[plan.flavour].title}, asked for {FLAVOURS[host.flavour].title}"
    if plan.version != host.version:
        return f"built by {FLAVOURS[plan.flavour].title} {plan.version}, here is {host.version}"
    return plan.target.misfit(host) or stale(bundle, spec, plan) or damaged(bundle, plan)


def damaged(bundle: Bundle, plan: PlanEntry) -> str:
    """Whether a plan's file is missing or of another size, in words; empty when not."""
    got = bundle.damage(plan.file)
    if not got:
        return ""
    return "file missing" if got == ABSENT else f"{got} instead of {bundle.manifest.files[plan.file].bytes}"


def stale(bundle: Bundle, spec: NetworkSpec, plan: PlanEntry) -> str:
    """Whether a plan of `spec` was built from other files than the bundle's, in words; empty when not."""
    entry, files = bundle.entry(spec), bundle.manifest.files
    graph = bundle.graph_name(spec, "tensorrt")
    if plan.graph_sha256 != files[graph].sha256:
        return f"built from another {graph} than the bundle's"
    if plan.weights_sha256 != files[entry.weights].sha256:
        return f"built from another {entry.weights} than the bundle's"
    return ""


def plans_of(bundle: Bundle, spec: NetworkSpec, flavour: FlavourName) -> list[PlanEntry]:
    """The plans of a network that one flavour made, for whatever card."""
    return [plan for plan in bundle.plans(spec) if plan.flavour == flavour]


def weight_bytes(bundle: Bundle, spec: NetworkSpec, plan: PlanEntry) -> int:
    """Of a plan of `spec`, on the GPU: as its compiler said, or else at most what its files hold."""
    if plan.compiled:
        return plan.compiled.weights_bytes
    files = bundle.manifest.files
    return max(files[plan.file].bytes, files[bundle.entry(spec).weights].bytes)


def fitting_plans(bundle: Bundle, spec: NetworkSpec, host: Host) -> list[PlanEntry]:
    """Those of `spec` that run on `host`; first the one made for this very card, if there is one."""
    fitting = [plan for plan in bundle.plans(spec) if not misfit(bundle, spec, plan, host)]
    return sorted(fitting, key=lambda plan: plan.target.breadth)


def refusal(bundle: Bundle, spec: NetworkSpec, host: Host) -> str:
    """What keeps every plan of `spec` from running on `host`; empty when one runs."""
    if fitting_plans(bundle, spec, host):
        return ""
    of_flavour = plans_of(bundle, spec, host.flavour)
    reasons = {plan.file: misfit(bundle, spec, plan, host) for plan in of_flavour}
    return "; ".join(f"{name} {reason}" for name, reason in reasons.items()) or "no plan"


def unfit(bundle: Bundle, spec: NetworkSpec, host: Host) -> BackendUnavailable | None:
    """The error that says for every plan of `spec` why it does not run on `host`, and what builds one that
    does; None where one runs."""
    refused = refusal(bundle, spec, host)
    if not refused:
        return None
    return BackendUnavailable(
        f"{FLAVOURS[host.flavour].title} plan of {spec.key} in bundle {bundle.folder}",
        expected=f"one for {host}",
        got=refused,
        remedy=build_remedy(bundle, host),
    )


def fitting_plan(bundle: Bundle, spec: NetworkSpec, host: Host) -> PlanEntry:
    """The plan that runs `spec` on `host`.  Raises what `unfit` says where there is none."""
    if error := unfit(bundle, spec, host):
        raise error
    return fitting_plans(bundle, spec, host)[0]
