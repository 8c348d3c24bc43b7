"""What the metrics service measures of itself, taken in without a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from agent360.mesh.metrics.frame import Columns
from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.rejections import Reason, Refused, Rejections
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.series_table import SeriesTable, TooManySeriesError

REJECTED: Final = "mesh_rejected_samples"
"""Counter of each tenant: samples that were refused, by ``reason``."""

_MAX_BUFFERED: Final = 100_000


class LocalMeasurements:
    """Buffers measurements of this process until they are flushed into the intake."""

    def __init__(
        self,
        table: SeriesTable,
        rejections: Rejections,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._rejections = rejections
        self._now = now
        self._samples: list[tuple[int, float, float, int]] = []

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: Mapping[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """See ``Measurements.count``."""
        self._add(SeriesId(tenant, name, _rows(labels), Kind.COUNTER, "1"), value, 1)

    def observe(
        self,
        name: str,
        value: float,
        labels: Mapping[str, str] | None = None,
        tenant: str = "",
        *,
        unit: str = "",
        count: int = 1,
    ) -> None:
        """See ``Measurements.observe``."""
        self._add(SeriesId(tenant, name, _rows(labels), Kind.DISTRIBUTION, unit), value, count)

    async def flush(self, intake: Intake) -> None:
        """Makes what was measured durable."""
        for (tenant, reason), count in self._rejections.drain().items():
            labels = (("reason", str(reason)),)
            # Not subject to the bound that it may tell about; there are few reasons.
            number = self._table.enter(SeriesId(tenant, REJECTED, labels, Kind.COUNTER, "1"))
            self._samples.append((number, self._now(), float(count), 1))
        if self._samples:
            samples, self._samples = self._samples, []
            numbers, times_s, values, weights = zip(*samples, strict=True)
            columns = Columns(
                np.array(numbers, np.int64),
                np.array(times_s, np.float64),
                np.array(values, np.float64),
                np.array(weights, np.int64),
            )
            await intake.room()
            await intake.take(columns, {})

    def _add(self, series: SeriesId, value: float, count: int) -> None:
        try:
            number = self._table.number(series)
        except TooManySeriesError as error:
            self._rejections.add([Refused(Reason.CARDINALITY, str(error), series.tenant)])
            return
        if len(self._samples) < _MAX_BUFFERED:
            self._samples.append((number, self._now(), value, count))


def _rows(labels: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items())) if labels else ()
