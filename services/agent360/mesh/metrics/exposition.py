"""The intake's counts for Prometheus, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.rejections import Rejections
from agent360.mesh.metrics.series_table import SeriesTable


class IntakeCollector:
    """A Prometheus collector of what is taken in. Tenants are in their own series, not here."""

    def __init__(self, intake: Intake, table: SeriesTable, rejections: Rejections) -> None:
        self._intake = intake
        self._table = table
        self._rejections = rejections

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        intake = self._intake
        yield CounterMetricFamily("metrics_samples", "Samples made durable.", intake.samples)
        rejected = CounterMetricFamily(
            "metrics_rejected_samples", "Samples refused, by reason.", labels=["reason"]
        )
        for reason, count in list(self._rejections.by_reason.items()):
            rejected.add_metric([str(reason)], count)
        yield rejected
        yield CounterMetricFamily(
            "metrics_commits", "Transactions of rollups into the store.", intake.commits
        )
        yield GaugeMetricFamily(
            "metrics_series", "Series known.", sum(self._table.sizes().values())
        )
        yield GaugeMetricFamily(
            "metrics_memory_bytes", "Rollups not in the store yet.", intake.memory_bytes
        )
        yield GaugeMetricFamily("metrics_journal_bytes", "Journal on disk.", intake.journal_bytes)
        yield GaugeMetricFamily(
            "metrics_journal_failing",
            "1 while the journal cannot be written and nothing is acknowledged.",
            float(bool(intake.fault)),
        )
        yield GaugeMetricFamily(
            "metrics_store_failing",
            "1 while the store takes nothing and the journal grows.",
            float(bool(intake.commit_fault)),
        )
