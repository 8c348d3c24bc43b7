"""What models were asked, by the measures of Triton's metrics."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.client.errors import MeshError
from agent360.mesh.runtime.call import MESH_TENANT

_SECONDS: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0, 120.0,
)  # fmt: skip
_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Measurements(Protocol):
    """Where measurements with tenants go; ``mesh.metrics`` is one."""

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: dict[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """Adds to a counter."""

    def observe(
        self, name: str, value: float, labels: dict[str, str] | None = None, tenant: str = ""
    ) -> None:
        """Adds an observation to a distribution."""


class _Histogram:
    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def write(self, family: HistogramMetricFamily, model: str) -> None:
        below, rows = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            rows.append((bound, float(below)))
        family.add_metric([model], rows, sum_value=self._total)


class ModelStatistics:
    """The counts of one model.

    A request is what a caller waits for; an inference is one prompt or one text; an execution is
    one call of a backend, which in a batch holds several inferences.
    """

    __slots__ = (
        "_labels", "_measurements", "batch_size", "compute_s", "executions", "failures",
        "first_response_s", "inferences", "model", "pending", "queue_s", "request_s", "successes",
    )  # fmt: skip

    def __init__(self, model: str, measurements: Measurements | None) -> None:
        self._labels = {"model": model}
        self._measurements = measurements
        self.model = model
        self.successes = 0
        self.failures: dict[str, int] = {}
        self.inferences = 0
        self.executions = 0
        self.pending = 0
        """Requests that wait now."""
        self.request_s = _Histogram(_SECONDS)
        self.queue_s = _Histogram(_SECONDS)
        self.compute_s = _Histogram(_SECONDS)
        self.first_response_s = _Histogram(_SECONDS)
        self.batch_size = _Histogram(_SIZES)

    def began(self, tenant: str, queue_s: float) -> None:
        """A request was given its turn, or its place in a batch."""
        self.queue_s.add(queue_s)
        self._observe("inference_queue_duration_seconds", queue_s, tenant)

    def executed(self, inferences: int, compute_s: float) -> None:
        """A backend answered one call that held so many inferences."""
        self.executions += 1
        self.inferences += inferences
        self.compute_s.add(compute_s)
        self.batch_size.add(inferences)
        if self._measurements is not None:
            # Several tenants may share a batch: its size is nobody's own.
            self._measurements.observe(
                "inference_batch_size", float(inferences), self._labels, MESH_TENANT
            )

    def succeeded(
        self, tenant: str, request_s: float, compute_s: float, first_response_s: float
    ) -> None:
        """A request was answered; times are since it came, since it began, and since it came."""
        self.successes += 1
        self.request_s.add(request_s)
        self.first_response_s.add(first_response_s)
        if self._measurements is not None:
            self._measurements.count("inference_request_success_total", 1.0, self._labels, tenant)
        self._observe("inference_request_duration_seconds", request_s, tenant)
        self._observe("inference_compute_duration_seconds", compute_s, tenant)

    def failed(self, tenant: str, reason: str) -> None:
        """A request got no answer."""
        self.failures[reason] = self.failures.get(reason, 0) + 1
        if self._measurements is not None:
            self._measurements.count(
                "inference_request_failure_total",
                1.0,
                {**self._labels, "reason": reason},
                tenant,
            )

    def _observe(self, name: str, seconds: float, tenant: str) -> None:
        if self._measurements is not None:
            # Two digits are finer than a bucket, and let equal values be counted together.
            self._measurements.observe(name, float(f"{seconds:.2g}"), self._labels, tenant)


class Statistics:
    """The counts of all models: a Prometheus collector, without tenants.

    With tenants they go to ``measurements``, under the same names.

    Example:
        >>> statistics = Statistics(mesh.metrics)
        >>> registry.register(statistics)
        >>> statistics.of("small").failed("acme", "QUEUE_FULL")
    """

    def __init__(self, measurements: Measurements | None = None) -> None:
        self._measurements = measurements
        self._models: dict[str, ModelStatistics] = {}

    def of(self, model: str) -> ModelStatistics:
        """The counts of one model."""
        found = self._models.get(model)
        if found is None:
            found = self._models[model] = ModelStatistics(model, self._measurements)
        return found

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        models = list(self._models.values())
        failures = CounterMetricFamily(
            "inference_request_failure",
            "Requests of a model that got no answer, by reason.",
            labels=["model", "reason"],
        )
        for each in models:
            for reason, count in list(each.failures.items()):
                failures.add_metric([each.model, reason], count)
        yield failures
        pending = GaugeMetricFamily(
            "inference_pending_requests",
            "Requests that wait for a model now.",
            labels=["model"],
        )
        for each in models:
            pending.add_metric([each.model], each.pending)
        yield pending
        for name, text, attribute in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for each in models:
                counter.add_metric([each.model], getattr(each, attribute))
            yield counter
        for name, text, attribute in _HISTOGRAMS:
            histogram = HistogramMetricFamily(name, text, labels=["model"])
            for each in models:
                getattr(each, attribute).write(histogram, each.model)
            yield histogram


_COUNTERS: Final = (
    ("inference_request_success", "Requests that a model answered.", "successes"),
    ("inference_count", "Prompts and texts that a model worked on.", "inferences"),
    ("inference_exec_count", "Calls of backends, each a batch of inferences.", "executions"),
)
_HISTOGRAMS: Final = (
    ("inference_request_duration_seconds", "Time from entering the queue to the end of the answer.",
     "request_s"),
    ("inference_queue_duration_seconds", "Time in the queue.", "queue_s"),
    ("inference_compute_duration_seconds", "Time of one call of a backend.", "compute_s"),
    ("inference_first_response_seconds", "Time from entering the queue to the first response.",
     "first_response_s"),
    ("inference_batch_size", "Inferences in one call of a backend.", "batch_size"),
)  # fmt: skip


def reason_of(error: BaseException) -> str:
    """The reason under which a failure is counted."""
    if isinstance(error, MeshError):
        return error.reason
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"
