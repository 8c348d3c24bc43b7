"""How the backends are doing, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.inference.members import Health, Member


class FleetMetrics:
    """A collector of what is known of backends.

    Example:
        >>> registry.register(FleetMetrics(members))
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def describe(self) -> Iterator[Metric]:
        """Names no metrics: without this the registry would collect to find them out."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The metrics, as they are now."""
        up = _gauge("up", "1 where a backend answers, also if it fails now and then; else 0.")
        running = _gauge("running", "Requests that a backend works on.")
        tokens = _gauge("outstanding_tokens", "Tokens that these will probably take.")
        latency = _gauge("latency_seconds", "Moving average of the time that answers took.")
        now = time.monotonic()
        for member in self._members:
            labels = [member.name]
            up.add_metric(labels, member.health in (Health.READY, Health.DEGRADED))
            running.add_metric(labels, member.running)
            tokens.add_metric(labels, member.outstanding_tokens)
            latency_s = member.latency_s(now)
            if latency_s is not None:
                latency.add_metric(labels, latency_s)
        yield from (up, running, tokens, latency)


def _gauge(name: str, help_: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"inference_backend_{name}", help_, labels=["backend"])
