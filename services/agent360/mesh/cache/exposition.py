"""The cache's counts for Prometheus, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.ports import Store


class StoreCollector:
    """A Prometheus collector of a store. Tenants and namespaces are in GetStats, not here."""

    def __init__(self, store: Store, bounds: Bounds) -> None:
        self._store = store
        self._bounds = bounds

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        counts = self._store.totals()
        lookups = CounterMetricFamily("cache_lookups", "Lookups by outcome.", labels=["outcome"])
        lookups.add_metric(["hit"], counts.hits)
        lookups.add_metric(["shared_hit"], counts.shared_hits)
        lookups.add_metric(["stale"], counts.stale_hits)
        lookups.add_metric(["miss"], counts.misses)
        yield lookups
        yield CounterMetricFamily(
            "cache_fail_safe", "Stale entries that stood in after a failure.", counts.fail_safe_hits
        )
        yield CounterMetricFamily(
            "cache_degraded", "Lookups while the shared store was away.", counts.degraded
        )
        yield CounterMetricFamily("cache_writes", "Entries written.", counts.sets)
        fills = CounterMetricFamily("cache_fills", "Fills of claimed keys.", labels=["outcome"])
        fills.add_metric(["filled"], counts.fills)
        fills.add_metric(["failed"], counts.fill_failures)
        yield fills
        yield CounterMetricFamily(
            "cache_fill_seconds", "Time between claim and fill, added up.", counts.fill_time_s
        )
        admissions = CounterMetricFamily(
            "cache_admissions", "Entries the policy let in or refused.", labels=["decision"]
        )
        admissions.add_metric(["admitted"], counts.admissions)
        admissions.add_metric(["rejected"], counts.rejections)
        yield admissions
        removals = CounterMetricFamily(
            "cache_removals", "Entries that went, by reason.", labels=["reason"]
        )
        removals.add_metric(["evicted"], counts.evictions)
        removals.add_metric(["expired"], counts.expirations)
        removals.add_metric(["invalidated"], counts.invalidations)
        yield removals
        yield GaugeMetricFamily("cache_entries", "Entries held.", len(self._store))
        yield GaugeMetricFamily("cache_entries_max", "Entries allowed.", self._bounds.entries)
        yield GaugeMetricFamily(
            "cache_bytes", "Bytes held, bookkeeping included.", self._store.size_bytes
        )
        yield GaugeMetricFamily("cache_bytes_max", "Bytes allowed.", self._bounds.size_bytes)
