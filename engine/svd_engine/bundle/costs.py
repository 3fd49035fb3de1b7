"""Memory of a bundle's networks: as TensorRT's compiler said, or counted in the graphs for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from svd_engine.bundle.external_data import read_graph
from svd_engine.bundle.flavours import FlavourName, Host
from svd_engine.bundle.graph_limits import run_bytes
from svd_engine.bundle.manifest import PlanEntry
from svd_engine.bundle.plans import fitting_plans, plans_of, unfit, weight_bytes
from svd_engine.bundle.reading import Bundle
from svd_engine.errors import BackendUnavailable
from svd_engine.spec.cost import CostOf, NetworkCost
from svd_engine.spec.tensors import NetworkSpec, StreamedSpec


class PlanCosts:
    """Of one flavour's plans: of those that run on `host`.

    Where the card is not known, host being None, every plan counts; of several for a network those of the
    most memory.
    """

    def __init__(self, bundle: Bundle, flavour: FlavourName, host: Host | None = None) -> None:
        self.bundle, self.flavour, self.host = bundle, flavour, host

    def __call__(self, spec: NetworkSpec) -> NetworkCost:
        """Raises BackendUnavailable where no plan was built, or none for this card."""
        if isinstance(spec, StreamedSpec):
            return streamed_cost(spec, self.bundle.segments(spec), self)
        if missing := self.missing(spec):
            raise missing
        plans = self._plans(spec)
        weights = {plan.file: weight_bytes(self.bundle, spec, plan) for plan in plans}
        plan = max(plans, key=lambda plan: weights[plan.file] + plan.device_memory_bytes)
        compiled = plan.compiled
        least = [plan.least_weight_bytes for plan in plans if plan.least_weight_bytes is not None]
        return NetworkCost(
            {spec.key: weights[plan.file]},
            plan.device_memory_bytes + boundary_bytes(spec),
            traffic_bytes=compiled.read_bytes + compiled.written_bytes if compiled else 0,
            source="compiled",
            least_weight_bytes=max(least) if len(least) == len(plans) else None,
        )

    def missing(self, spec: NetworkSpec, streaming: bool = False) -> BackendUnavailable | None:
        """What to say where no plan of a network can run, or with `streaming` none whose weights stream."""
        if isinstance(spec, StreamedSpec):
            return next(filter(None, map(self.missing, self.bundle.segments(spec))), None)
        if self.host and (error := unfit(self.bundle, spec, self.host)):
            return error
        plans = self._plans(spec)
        if not plans:
            return BackendUnavailable(
                f"plan of {spec.key} in bundle {self.bundle.folder}",
                expected=f"one of {self.flavour}, whose compiler says what memory it takes",
                got="none",
                remedy=f"Run: {self.bundle.plans_command(self.flavour)}",
            )
        if streaming and any(plan.least_weight_bytes is None for plan in plans):
            return BackendUnavailable(
                f"weight streaming of {spec.key} in bundle {self.bundle.folder}",
                expected=f"plans of {self.flavour} that were built for it",
                got="plans whose weights all stay on the GPU",
                remedy=f"Run: {self.bundle.plans_command(self.flavour, stream_weights=True)}",
            )
        return None

    def _plans(self, spec: NetworkSpec) -> list[PlanEntry]:
        """Those that may run a network: on a card that is known the one that does."""
        if self.host is None:
            return plans_of(self.bundle, spec, self.flavour)
        return fitting_plans(self.bundle, spec, self.host)[:1]


class GraphCosts:
    """Of the graphs that ONNX Runtime runs.  Its CPU provider computes half precision in float32."""

    def __init__(self, bundle: Bundle, device: str) -> None:
        self.bundle, self.device = bundle, device
        self._known: dict[str, NetworkCost] = {}  # by key

    def __call__(self, spec: NetworkSpec) -> NetworkCost:
        if isinstance(spec, StreamedSpec):
            return streamed_cost(spec, self.bundle.segments(spec), self, on_host=self.device == "cpu")
        if spec.key not in self._known:
            path = self.bundle.folder / self.bundle.graph_name(spec, "onnxruntime")
            widened = self.device == "cpu" and spec.precision.weights != "float32"
            weights = self.bundle.manifest.files[self.bundle.entry(spec).weights].bytes
            self._known[spec.key] = NetworkCost(
                {spec.key: weights * (3 if widened else 1)},
                run_bytes(path, read_graph(path)) * (2 if widened else 1),
            )
        return self._known[spec.key]


def streamed_cost(
    decoder: StreamedSpec, segments: Sequence[NetworkSpec], cost_of: CostOf, on_host: bool = False
) -> NetworkCost:
    """Of a streamed decoder: one segment is open at a time, and activations are parked between two.

    on_host: whether they lie in the memory that networks run in.
    """
    frames, size = decoder.inputs[0].shape[0], decoder.slice_frames
    costs = {segment.key: cost_of(segment) for segment in segments}
    largest = max(costs.values(), key=lambda cost: cost.weight_bytes + cost.activation_bytes)
    head, *sliced, _finish = segments
    of_head = head.outputs[0].nbytes
    layers = [segment for segment in sliced if segment.outputs[0].name != "mean"]
    left = [segment.outputs[0].nbytes // size * frames for segment in layers]  # front, then each layer
    parked = max(a if a == b else a + b for a, b in zip([of_head, *left[:-1]], left, strict=True))
    moved = 2 * of_head + 3 * sum(left[:-1]) + 2 * left[-1]  # activations are read by two segments
    passes = ceil(frames / size)
    return NetworkCost(
        {decoder.key: largest.weight_bytes},
        largest.activation_bytes + (parked if on_host else 0),
        0 if on_host else parked,
        0 if on_host else moved,
        traffic_bytes=sum(
            costs[segment.key].traffic_bytes * (passes if segment in sliced else 1) for segment in segments
        ),
        source=largest.source,
    )


def boundary_bytes(spec: NetworkSpec) -> int:
    """Of a network's inputs and outputs."""
    return sum(tensor.nbytes for tensor in (*spec.inputs, *spec.outputs))
