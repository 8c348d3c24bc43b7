"""The session's counts for Prometheus, read when they are asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.metrics.stores.cassandra.counts import BOUNDS_S
from agent360.mesh.metrics.stores.cassandra.failures import ErrorKind
from agent360.mesh.metrics.stores.cassandra.session import Session


class CassandraCollector:
    """A Prometheus collector of a session.

    Example:
        >>> registry.register(CassandraCollector(session))
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        session, counts = self._session, self._session.counts
        yield GaugeMetricFamily(
            "cassandra_connections", "Connections that are open.", session.connections
        )
        yield CounterMetricFamily(
            "cassandra_connections_recycled",
            "Connections that were replaced because of their age.",
            counts.recycled,
        )
        yield GaugeMetricFamily(
            "cassandra_requests_in_flight", "Requests on their way.", session.in_flight
        )
        yield GaugeMetricFamily(
            "cassandra_requests_waiting",
            "Requests that wait because max_in_flight are on their way.",
            session.waiting,
        )
        latencies = HistogramMetricFamily(
            "cassandra_request_seconds",
            "How long answered requests took, by what they do.",
            labels=["operation"],
        )
        for operation, seen in counts.latencies.items():
            bounds = [*(str(bound) for bound in BOUNDS_S), "+Inf"]
            buckets = list(zip(bounds, map(float, itertools.accumulate(seen.buckets)), strict=True))
            latencies.add_metric([operation], buckets, seen.total_s)
        yield latencies
        errors = CounterMetricFamily(
            "cassandra_errors", "Requests that failed, by kind.", labels=["kind"]
        )
        for kind in get_args(ErrorKind):
            errors.add_metric([kind], counts.errors[kind])
        yield errors
        yield CounterMetricFamily(
            "cassandra_retries", "Requests that were tried once more.", counts.retries
        )
        up = GaugeMetricFamily(
            "cassandra_node_up", "Whether a node is there (1) or away (0).", labels=["node"]
        )
        for node, is_up in session.nodes().items():
            up.add_metric([node], float(is_up))
        yield up
