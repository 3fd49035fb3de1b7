"""Counters beside Triton's own: how requests ended inside the model, and what its stages cost.

Triton counts the rest: requests waiting (nv_inference_pending_request_count), refused by the queue or
cancelled in it (nv_inference_request_failure), time in the queue (nv_inference_queue_duration_us).
"""

from __future__ import annotations

from typing import Any

REQUEST_OUTCOMES = ("done", "cancelled", "refused", "failed")


class Metrics:
    """`family` is triton_python_backend_utils.MetricFamily.  Counters exist, at 0, from the start."""

    def __init__(self, family: Any, model: str) -> None:
        self._model = model
        self._requests = family(
            name="svd_requests_total",
            description="Requests that reached the model, by outcome",
            kind=family.COUNTER,
        )
        self._milliseconds = family(
            name="svd_stage_milliseconds_total",
            description="Milliseconds spent in each stage of finished videos",
            kind=family.COUNTER,
        )
        self._outcomes = {
            outcome: self._requests.Metric(labels={"model": model, "outcome": outcome})
            for outcome in REQUEST_OUTCOMES
        }
        self._stages: dict[str, Any] = {}

    def count(self, outcome: str) -> None:
        self._outcomes[outcome].increment(1)

    def time(self, stage_ms: dict[str, float]) -> None:
        for stage, milliseconds in stage_ms.items():
            if stage not in self._stages:
                labels = {"model": self._model, "stage": stage}
                self._stages[stage] = self._milliseconds.Metric(labels=labels)
            self._stages[stage].increment(milliseconds)
