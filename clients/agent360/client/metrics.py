"""The client of the metrics service: measurements and queries."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from agent360.client.coalescer import Coalescer, Wire
from agent360.client.context import current_scope
from agent360.client.reporter import Reporter, Series
from agent360.metrics.v1 import metrics_pb2

WIRE: Final = Wire(
    "agent360.metrics.v1.MetricsService",
    metrics_pb2.ReportRequest,
    metrics_pb2.ReportRequest,
    metrics_pb2.ReportResponse,
    metrics_pb2.ReportResponse,
)

Labels = Mapping[str, str]


class MetricsClient:
    """Reports measurements in the background and asks questions about them.

    Example:
        >>> mesh.metrics.count("plans_made", labels={"kind": "trip"})
        >>> mesh.metrics.observe("plan_seconds", 0.42, unit="s")
        >>> await mesh.metrics.flush()
    """

    def __init__(self, reporter: Reporter, coalescer: Coalescer, tenant: str = "") -> None:
        self._reporter = reporter
        self._coalescer = coalescer
        self._tenant = tenant

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "1",
    ) -> None:
        """Adds to a counter; returns at once."""
        series = self._series(name, labels, metrics_pb2.SERIES_KIND_COUNTER, tenant, unit)
        self._reporter.count(series, value)

    def gauge(
        self,
        name: str,
        value: float,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "",
    ) -> None:
        """Sets a gauge; returns at once."""
        series = self._series(name, labels, metrics_pb2.SERIES_KIND_GAUGE, tenant, unit)
        self._reporter.gauge(series, value)

    def observe(
        self,
        name: str,
        value: float,
        labels: Labels | None = None,
        tenant: str = "",
        *,
        unit: str = "",
        count: int = 1,
    ) -> None:
        """Adds ``count`` observations of ``value`` to a distribution; returns at once."""
        series = self._series(name, labels, metrics_pb2.SERIES_KIND_DISTRIBUTION, tenant, unit)
        self._reporter.observe(series, value, count)

    @property
    def dropped(self) -> int:
        """Values that were given up because the service was away for too long."""
        return self._reporter.dropped

    @property
    def rejected(self) -> int:
        """Values that the service refused; ``rejections`` says why."""
        return self._reporter.rejected

    @property
    def rejections(self) -> tuple[str, ...]:
        """Why values were refused: the last few reasons that the service named."""
        return tuple(self._reporter.rejections)

    async def flush(self) -> None:
        """Waits until everything measured so far is durable."""
        await self._reporter.flush()

    async def query(
        self,
        request: metrics_pb2.QueryRequest,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[metrics_pb2.Group]:
        """Yields the groups of a query, page by page.

        Raises:
            MeshError: the query is not valid, or the service could not be asked.
        """
        page_request = metrics_pb2.QueryRequest()
        page_request.CopyFrom(request)
        while True:
            page = await self._coalescer.unary(
                "Query", page_request, metrics_pb2.QueryResponse, timeout, tenant
            )
            for group in page.groups:
                yield group
            if not page.next_page_token:
                return
            page_request.page_token = page.next_page_token

    async def list_series(
        self,
        name: str = "",
        *,
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[metrics_pb2.Series]:
        """Yields the tenant's series, in the order of names and labels."""
        request = metrics_pb2.ListSeriesRequest(name=name, page_size=page_size)
        request.read_mask.paths.extend(fields)
        while True:
            page = await self._coalescer.unary(
                "ListSeries", request, metrics_pb2.ListSeriesResponse, timeout, tenant
            )
            for series in page.series:
                yield series
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _series(
        self, name: str, labels: Labels | None, kind: int, tenant: str, unit: str
    ) -> Series:
        rows = tuple(labels.items()) if labels else ()
        tenant = tenant or current_scope().tenant or self._tenant
        return self._reporter.series(tenant, name, rows, kind, unit)
