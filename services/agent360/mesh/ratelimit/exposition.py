"""Prometheus metrics of a limiter."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.ratelimit.limiter import Limiter


class LimiterCollector:
    """A Prometheus collector of a limiter's counts."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        yield CounterMetricFamily(
            "ratelimit_allowed", "Requests that were allowed.", self._limiter.allowed
        )
        denied = CounterMetricFamily(
            "ratelimit_denied", "Requests that were denied, by limit.", labels=["limit"]
        )
        for limit_id, count in list(self._limiter.denied.items()):
            denied.add_metric([limit_id], count)
        yield denied
