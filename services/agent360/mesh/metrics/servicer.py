"""The wire side of the metrics service: MetricsService, AuditService, ProfilingService."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

from agent360.audit.v1 import audit_pb2
from agent360.client.errors import InvalidRequestError
from agent360.mesh.metrics import wire
from agent360.mesh.metrics.ports import AuditEvent, Store
from agent360.mesh.metrics.query import answer
from agent360.mesh.metrics.rollup import Kind, Sample, SeriesId
from agent360.mesh.metrics.settings import SCHEME, MetricsSettings
from agent360.mesh.metrics.stores.sqlite import SqliteStore
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition
from agent360.metrics.v1 import metrics_pb2
from agent360.profiling.v1 import profiling_pb2

_METRICS: Final = metrics_pb2.DESCRIPTOR.services_by_name["MetricsService"]
_AUDIT: Final = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
_PROFILING: Final = profiling_pb2.DESCRIPTOR.services_by_name["ProfilingService"]
_LOCAL_EVERY_S: Final = 1.0
_EXPIRE_EVERY_S: Final = 600.0
_NAMED_REJECTIONS: Final = 10


class LocalMeasurements:
    """What the metrics service measures of itself, taken in without a call."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._samples: list[Sample] = []
        self._reporter_id = f"metrics-{uuid.uuid4().hex}"
        self._sequence = 0

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: Mapping[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """See ``Measurements.count``."""
        series = SeriesId(tenant, name, _rows(labels), Kind.COUNTER, "1")
        self._samples.append(Sample(series, time.time(), value, 1))

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
        series = SeriesId(tenant, name, _rows(labels), Kind.DISTRIBUTION, unit)
        self._samples.append(Sample(series, time.time(), value, count))

    async def flush(self) -> None:
        """Stores what was measured."""
        if self._samples:
            samples, self._samples = self._samples, []
            self._sequence += 1
            await self._store.take(self._reporter_id, self._sequence, samples)


class MetricsServicer:
    """Serves measurements and audit events; profiles come later."""

    def __init__(self, settings: MetricsSettings, context: ServiceContext) -> None:
        self._settings = settings
        self._log = context.log
        self._store: Store = SqliteStore(
            settings.store.removeprefix(SCHEME), settings.max_series_per_tenant
        )
        self.measurements = LocalMeasurements(self._store)
        self._draining = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        return (
            ServiceDefinition(
                _METRICS,
                unary={"Query": self.query, "ListSeries": self.list_series},
                bidirectional={"Report": self.report},
                planned={
                    "Watch": "watched queries",
                    "SetAlertRule": "alerts",
                    "ListAlertRules": "alerts",
                    "DeleteAlertRule": "alerts",
                    "ListAlerts": "alerts",
                },
            ),
            ServiceDefinition(
                _AUDIT, batch={"Record": self.record}, unary={"ListEvents": self.list_events}
            ),
            ServiceDefinition(_PROFILING, planned={"Profile": "profiling on demand"}),
        )

    async def start(self) -> None:
        """See ``Servicer.start``."""
        self._tasks = [
            asyncio.create_task(self._keep_local()),
            asyncio.create_task(self._keep_expiring()),
        ]

    def drain(self) -> None:
        """Asks reporters to go on with a new stream."""
        self._draining.set()

    async def close(self) -> None:
        """See ``Servicer.close``."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.measurements.flush()
        await self._store.close()

    # ---------------------------------------------------------------- measurements

    async def report(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Takes messages of samples; acknowledges each once it is durable."""
        reader = wire.ReportReader(call)
        stopping = asyncio.create_task(self._draining.wait())
        try:
            while True:
                coming = asyncio.ensure_future(anext(requests, None))
                await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    yield metrics_pb2.ReportResponse(drain=True)
                    return
                request = coming.result()
                if request is None:
                    return
                samples, refused = reader.read(request)
                intake = await self._store.take(request.reporter_id, request.sequence, samples)
                reasons = [*refused, *intake.rejections]
                yield metrics_pb2.ReportResponse(
                    acknowledged=request.sequence,
                    rejected=len(reasons),
                    rejections=reasons[:_NAMED_REJECTIONS],
                )
        finally:
            stopping.cancel()

    async def query(self, call: Call, request: Any) -> Any:
        """Aggregates series over a time range."""
        size = page_size(request.page_size)
        query = wire.read_query(call.tenant, request, time.time())
        fingerprint = wire.without_page(request)
        offset = decode_page_token(call.tenant, fingerprint, request.page_token) or 0
        masked = read_mask(request, metrics_pb2.Group)
        rows = await self._store.rollups(
            call.tenant, query.name, query.matchers, query.start_s, query.end_s
        )
        groups = answer(query, rows)
        response = metrics_pb2.QueryResponse()
        for group in groups[offset : offset + size]:
            response.groups.append(masked(wire.group_message(group)))
        if len(groups) > offset + size:
            response.next_page_token = encode_page_token(call.tenant, fingerprint, offset + size)
        return response

    async def list_series(self, call: Call, request: Any) -> Any:
        """Lists the tenant's series."""
        size = page_size(request.page_size)
        matchers = wire.read_matchers(request.matchers)
        fingerprint = wire.without_page(request)
        offset = decode_page_token(call.tenant, fingerprint, request.page_token) or 0
        masked = read_mask(request, metrics_pb2.Series)
        found = [
            series
            for series in await self._store.series(call.tenant, request.name)
            if all(matcher.holds(dict(series.labels)) for matcher in matchers)
        ]
        response = metrics_pb2.ListSeriesResponse()
        for series in found[offset : offset + size]:
            response.series.append(masked(wire.series_message(series)))
        if len(found) > offset + size:
            response.next_page_token = encode_page_token(call.tenant, fingerprint, offset + size)
        return response

    # ---------------------------------------------------------------- audit

    async def record(self, items: Sequence[Item], emit: Emit) -> None:
        """Records events; they share a transaction."""
        for item in items:
            try:
                event = wire.read_event(item.call, item.request)
            except InvalidRequestError as error:
                emit.fail(item, error)
                continue
            emit.start(item, self._record(item, emit, event))

    async def list_events(self, call: Call, request: Any) -> Any:
        """Lists events, the newest first."""
        size = page_size(request.page_size)
        wanted = wire.read_event_filter(call.tenant, request)
        query = request.filter.SerializeToString(deterministic=True)
        position = decode_page_token(call.tenant, query, request.page_token)
        masked = read_mask(request, audit_pb2.Event)
        before = (int(position[0]), str(position[1])) if position else None
        events = await self._store.events(wanted, before, size + 1)
        response = audit_pb2.ListEventsResponse()
        for event in events[:size]:
            response.events.append(masked(audit_pb2.Event.FromString(event.body)))
        if len(events) > size:
            last = events[size - 1]
            response.next_page_token = encode_page_token(
                call.tenant, query, [last.time_us, last.event_id]
            )
        return response

    async def _record(self, item: Item, emit: Emit, event: AuditEvent) -> None:
        await self._store.record(event)
        emit.reply(item).event_id = event.event_id

    # ---------------------------------------------------------------- in the background

    async def _keep_local(self) -> None:
        while True:
            await asyncio.sleep(_LOCAL_EVERY_S)
            await self.measurements.flush()

    async def _keep_expiring(self) -> None:
        while True:
            await self._store.expire(time.time() - self._settings.retention_s)
            await asyncio.sleep(_EXPIRE_EVERY_S)


def _rows(labels: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items())) if labels else ()
