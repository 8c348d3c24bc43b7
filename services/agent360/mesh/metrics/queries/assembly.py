"""Puts together what answers queries."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.metrics.history import History
from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.queries.engine import QueryEngine, QueryLimits
from agent360.mesh.metrics.queries.kept import KeptBlocks
from agent360.mesh.metrics.queries.rpcs import QueryRpcs
from agent360.mesh.metrics.queries.watches import Watches, WatchLimits
from agent360.mesh.metrics.settings import MetricsSettings

_ALONE: Final = "sqlite:"
_SETTLED_S: Final = 10.0


class Queries(NamedTuple):
    """What answers queries."""

    engine: QueryEngine
    kept: KeptBlocks
    watches: Watches
    rpcs: QueryRpcs

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        kept = self.kept
        for name, text, value in (
            ("hits", "Blocks of steps found in the query cache.", kept.hits),
            ("misses", "Blocks of steps that had to be read.", kept.misses),
            ("invalidated", "Blocks that samples took away that came late.", kept.invalidated),
        ):
            yield CounterMetricFamily(f"metrics_query_cache_{name}", text, value)
        text = "Size of the query cache."
        yield GaugeMetricFamily("metrics_query_cache_bytes", text, kept.size_bytes)
        yield GaugeMetricFamily("metrics_watches", "Watches that are open.", self.watches.size)


def assemble_queries(settings: MetricsSettings, history: History, intake: Intake) -> Queries:
    """Makes them; samples that are taken in from now on reach the cache."""
    bounds = settings.query
    alone = settings.store.startswith(_ALONE)
    kept = KeptBlocks(
        max_bytes=bounds.cache_bytes,
        max_tenant_bytes=bounds.cache_tenant_bytes,
        max_age_s=math.inf if alone else bounds.cache_max_age_s,
    )
    intake.told.append(kept.taken)
    # What other replicas took is seen once they have stored it.
    settled_s = _SETTLED_S if alone else _SETTLED_S + 2 * settings.intake.commit_every_s
    limits = QueryLimits(bounds.max_rollups, bounds.max_points, bounds.at_once, settled_s)
    engine = QueryEngine(history, kept, limits)
    watch_limits = WatchLimits(
        bounds.max_watches, bounds.max_tenant_watches, settings.stream.max_age_s
    )
    watches = Watches(engine, watch_limits)
    return Queries(engine, kept, watches, QueryRpcs(engine, history, watches))
