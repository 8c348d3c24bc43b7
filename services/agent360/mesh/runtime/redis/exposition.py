"""The client's counts for Prometheus, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.runtime.redis.client import Redis
from agent360.mesh.runtime.redis.counts import ClosedReason, ErrorKind


class RedisCollector:
    """A Prometheus collector of a client.

    Example:
        >>> registry.register(RedisCollector(redis))
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        counts, servers = self._redis.counts, self._redis.topology.servers
        connections = GaugeMetricFamily(
            "redis_connections", "Connections that are open.", labels=["state"]
        )
        connections.add_metric(["idle"], sum(server.pool.idle for server in servers))
        connections.add_metric(["in_use"], sum(server.pool.in_use for server in servers))
        yield connections
        yield CounterMetricFamily("redis_connections_opened", "Connections opened.", counts.opened)
        closed = CounterMetricFamily(
            "redis_connections_closed", "Connections closed, by reason.", labels=["reason"]
        )
        for reason in get_args(ClosedReason):
            closed.add_metric([reason], counts.closed[reason])
        yield closed
        yield CounterMetricFamily(
            "redis_pool_waits", "Pipelines that waited for a connection.", counts.waits
        )
        yield CounterMetricFamily(
            "redis_pool_wait_seconds", "Time waited for connections, in seconds.", counts.wait_s
        )
        yield CounterMetricFamily("redis_round_trips", "Pipelines sent.", counts.round_trips)
        yield CounterMetricFamily("redis_commands", "Commands sent.", counts.commands)
        errors = CounterMetricFamily("redis_errors", "What failed, by kind.", labels=["kind"])
        for kind in get_args(ErrorKind):
            errors.add_metric([kind], counts.errors[kind])
        yield errors
        up = GaugeMetricFamily(
            "redis_server_up", "Whether a server is there (1) or away (0).", labels=["server"]
        )
        for server in servers:
            up.add_metric([server.address], 0 if server.away else 1)
        yield up
