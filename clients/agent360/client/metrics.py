"""The client of the metrics service: measurements and queries."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import grpc

from agent360.client.alerts import silence_of
from agent360.client.coalescer import Coalescer, Wire
from agent360.client.context import current_scope
from agent360.client.errors import MeshError
from agent360.client.metric_queries import LabelMatch, MetricGroup, matcher_messages
from agent360.client.reporter import Reporter, Series
from agent360.client.watching import is_refusal, next_response, pause
from agent360.metrics.v1 import metrics_pb2

WIRE: Final = Wire(
    "agent360.metrics.v1.MetricsService",
    metrics_pb2.ReportRequest,
    metrics_pb2.ReportRequest,
    metrics_pb2.ReportResponse,
    metrics_pb2.ReportResponse,
)

Labels = Mapping[str, str]

_MAX_SILENCE_S: Final = 30.0
"""A watch without a response for this long is broken: a service gives a sign of life every 10 s."""


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
        query: metrics_pb2.QueryRequest,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[MetricGroup]:
        """Yields the groups of a query, page by page.

        Args:
            query: from ``metric_query``.
            timeout: seconds for each page.
            tenant: whose series; None: the current scope's, or the Mesh's; ``*``: those of all,
                for admins.

        Raises:
            MeshError: the query is not valid, would cost too much, or could not be asked.
        """
        request = metrics_pb2.QueryRequest()
        request.CopyFrom(query)
        while True:
            page = await self._coalescer.unary(
                "Query", request, metrics_pb2.QueryResponse, timeout, tenant
            )
            for group in page.groups:
                yield MetricGroup(group)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def watch(
        self,
        query: metrics_pb2.QueryRequest,
        *,
        interval: timedelta | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[list[MetricGroup]]:
        """Yields the groups of a query now, and again as steps end, until the caller leaves.

        The first list has the whole range; later ones the steps that are new or may have changed.
        A stream that breaks is opened again, and begins anew.

        Args:
            query: from ``metric_query``, without an end.
            interval: how often; None: whenever a step ends, or without step every 10 s.
            tenant: as in ``query``.

        Raises:
            MeshError: the service refuses the query.
        """
        request = metrics_pb2.WatchRequest(query=query)
        if interval is not None:
            request.interval.FromTimedelta(interval)
        failures = 0
        while True:
            if failures:
                await pause(failures)
            call = None
            try:
                call = await self._coalescer.streaming(
                    "Watch", request, metrics_pb2.WatchResponse, tenant=tenant, lasting=True
                )
                while True:
                    news: metrics_pb2.WatchResponse = await next_response(call, _MAX_SILENCE_S)
                    failures = 0
                    if news.groups:
                        yield [MetricGroup(group) for group in news.groups]
            except MeshError as error:
                if is_refusal(error) or error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                failures += 1
            finally:
                if call is not None:
                    call.cancel()

    async def list_series(
        self,
        name: str = "",
        *,
        where: Sequence[LabelMatch] = (),
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[metrics_pb2.Series]:
        """Yields the tenant's series, in the order of names and labels.

        Args:
            name: only of this metric; empty: of all.
            where: conditions on labels; all must hold.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: as in ``query``.
        """
        request = metrics_pb2.ListSeriesRequest(name=name, page_size=page_size)
        request.matchers.extend(matcher_messages(where))
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

    # ---------------------------------------------------------------- alerts

    async def set_alert_rule(
        self,
        rule: metrics_pb2.AlertRule,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> metrics_pb2.AlertRule:
        """Makes or replaces an alert rule, from ``alert_rule``; returns the one in force.

        Raises:
            MeshError: the rule is not valid, comes with the service, or there are too many.
        """
        request = metrics_pb2.SetAlertRuleRequest(rule=rule)
        answer = await self._coalescer.unary(
            "SetAlertRule", request, metrics_pb2.SetAlertRuleResponse, timeout, tenant
        )
        found: metrics_pb2.AlertRule = answer.rule
        return found

    async def delete_alert_rule(
        self, rule_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> None:
        """Removes an alert rule; its alerts are resolved.

        Raises:
            MeshError: NOT_FOUND, if there is no such rule.
        """
        request = metrics_pb2.DeleteAlertRuleRequest(rule_id=rule_id)
        await self._coalescer.unary(
            "DeleteAlertRule", request, metrics_pb2.DeleteAlertRuleResponse, timeout, tenant
        )

    async def list_alert_rules(
        self, *, page_size: int = 0, timeout: float | None = None, tenant: str | None = None
    ) -> AsyncIterator[metrics_pb2.AlertRule]:
        """Yields the tenant's alert rules, in the order of their ids."""
        request = metrics_pb2.ListAlertRulesRequest(page_size=page_size)
        while True:
            page = await self._coalescer.unary(
                "ListAlertRules", request, metrics_pb2.ListAlertRulesResponse, timeout, tenant
            )
            for rule in page.rules:
                yield rule
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def list_alerts(
        self, *, page_size: int = 0, timeout: float | None = None, tenant: str | None = None
    ) -> AsyncIterator[metrics_pb2.Alert]:
        """Yields alerts that are pending or firing, in the order of rules and labels.

        Args:
            page_size: how many to fetch at a time; 0: the service's default.
            timeout: seconds for each page.
            tenant: as in ``query``.
        """
        request = metrics_pb2.ListAlertsRequest(page_size=page_size)
        while True:
            page = await self._coalescer.unary(
                "ListAlerts", request, metrics_pb2.ListAlertsResponse, timeout, tenant
            )
            for alert in page.alerts:
                yield alert
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def create_silence(
        self,
        where: Sequence[LabelMatch],
        end: datetime,
        *,
        start: datetime | None = None,
        comment: str = "",
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> metrics_pb2.Silence:
        """Keeps alerts whose labels meet all conditions from being notified for a while.

        Args:
            where: conditions; at least one.
            end: when it ends.
            start: when it begins; None: now.
            comment: why.
            timeout: seconds.
            tenant: whose alerts; None: the current scope's, or the Mesh's.
        """
        request = metrics_pb2.CreateSilenceRequest(
            silence=silence_of(where, end, start, comment), request_id=str(uuid.uuid4())
        )
        answer = await self._coalescer.unary(
            "CreateSilence", request, metrics_pb2.CreateSilenceResponse, timeout, tenant
        )
        found: metrics_pb2.Silence = answer.silence
        return found

    async def expire_silence(
        self, silence_id: str, *, timeout: float | None = None, tenant: str | None = None
    ) -> None:
        """Ends a silence now.

        Raises:
            MeshError: NOT_FOUND, if there is no such silence.
        """
        request = metrics_pb2.ExpireSilenceRequest(silence_id=silence_id)
        await self._coalescer.unary(
            "ExpireSilence", request, metrics_pb2.ExpireSilenceResponse, timeout, tenant
        )

    async def list_silences(
        self,
        *,
        include_expired: bool = False,
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[metrics_pb2.Silence]:
        """Yields the tenant's silences, in the order of their ids."""
        request = metrics_pb2.ListSilencesRequest(
            include_expired=include_expired, page_size=page_size
        )
        while True:
            page = await self._coalescer.unary(
                "ListSilences", request, metrics_pb2.ListSilencesResponse, timeout, tenant
            )
            for silence in page.silences:
                yield silence
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _series(
        self, name: str, labels: Labels | None, kind: int, tenant: str, unit: str
    ) -> Series:
        rows = tuple(labels.items()) if labels else ()
        tenant = tenant or current_scope().tenant or self._tenant
        return self._reporter.series(tenant, name, rows, kind, unit)
