"""The wire side of the metrics service: MetricsService, AuditService, LogService and OTLP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.logs.v1.logs_pb2 import LogRecord
from agent360.mesh.metrics.alerts.rpcs import METHODS as ALERT_METHODS
from agent360.mesh.metrics.alerts.rpcs import AlertRpcs
from agent360.mesh.metrics.alerts.service import AlertService
from agent360.mesh.metrics.assembly import Openers, Parts, assemble
from agent360.mesh.metrics.audit.servicing import DESCRIPTOR as AUDIT
from agent360.mesh.metrics.audit.servicing import AuditService
from agent360.mesh.metrics.exposition import IntakeCollector
from agent360.mesh.metrics.logs.servicing import DESCRIPTOR as LOGS
from agent360.mesh.metrics.logs.servicing import LogService
from agent360.mesh.metrics.measurements import LocalMeasurements
from agent360.mesh.metrics.otlp import OtlpService
from agent360.mesh.metrics.otlp.service import SERVICE as OTLP
from agent360.mesh.metrics.queries.assembly import Queries, assemble_queries
from agent360.mesh.metrics.rejections import Rejections
from agent360.mesh.metrics.report import AcceptedTimes, ReportService
from agent360.mesh.metrics.series_table import SeriesTable
from agent360.mesh.metrics.settings import MetricsSettings
from agent360.mesh.runtime.admin import Readiness
from agent360.mesh.runtime.call import MESH_TENANT, Call, Emit, Item
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition, UnaryHandler
from agent360.metrics.v1 import metrics_pb2

_METRICS: Final = metrics_pb2.DESCRIPTOR.services_by_name["MetricsService"]


class Started(NamedTuple):
    """What there is once the service has started."""

    parts: Parts
    reports: ReportService
    otlp: OtlpService
    queries: Queries
    alerts: AlertRpcs
    audit: AuditService
    logs: LogService


class MetricsServicer:
    """Serves measurements, audit events and log records."""

    def __init__(
        self,
        settings: MetricsSettings,
        context: ServiceContext,
        openers: Openers | None = None,
    ) -> None:
        """Prepares the service.

        Args:
            settings: of the service.
            context: what the runtime gives.
            openers: how the disk is reached; None: as the settings say.
        """
        self._settings = settings
        self._log = context.log
        self._registry = context.registry
        self._openers = openers or Openers()
        self._table = SeriesTable(settings.max_series_per_tenant)
        self._rejections = Rejections()
        self.measurements = LocalMeasurements(self._table, self._rejections)
        self._started: Started | None = None

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        return (
            ServiceDefinition(
                _METRICS,
                unary={
                    "Query": self.query,
                    "ListSeries": self.list_series,
                    **{name: self._of_alerts(name) for name in ALERT_METHODS},
                },
                bidirectional={"Report": self.report},
                streaming={"Watch": self.watch},
                all_tenants=frozenset({"Query", "ListSeries", "Watch", "ListAlerts"}),
            ),
            ServiceDefinition(
                AUDIT,
                batch={"Record": self.record},
                unary={"ListEvents": self.list_events},
                streaming={"VerifyEvents": self.verify_events},
                all_tenants=frozenset({"VerifyEvents"}),
                long_lived=frozenset({"VerifyEvents"}),
            ),
            ServiceDefinition(
                LOGS,
                unary={"Write": self.write, "ListRecords": self.list_records},
                all_tenants=frozenset({"ListRecords"}),
                default_tenant=MESH_TENANT,
            ),
            ServiceDefinition(OTLP, unary={"Export": self.export}),
        )

    async def start(self) -> None:
        """See ``Servicer.start``."""
        parts = await assemble(
            self._settings, self._table, self.measurements, self._log, self._openers
        )
        queries = assemble_queries(self._settings, parts.history, parts.intake)
        alerts = AlertService(self._settings.alerts, parts.stores.rules, queries.engine, self._log)
        alerts.start()
        bounds = self._settings.intake
        times = AcceptedTimes(bounds.late_s, bounds.early_s)
        intake, table, rejections = parts.intake, self._table, self._rejections
        self._started = Started(
            parts,
            ReportService(intake, table, times, rejections),
            OtlpService(self._settings.otlp, intake, table, times, rejections),
            queries,
            AlertRpcs(alerts, max_rules=self._settings.alerts.max_rules),
            parts.audit,
            parts.logs,
        )
        for collector in parts.stores.collectors:
            self._registry.register(collector)
        self._registry.register(queries)
        self._registry.register(alerts)
        self._registry.register(IntakeCollector(parts.intake, self._table, self._rejections))

    def readiness(self) -> Readiness:
        """Ready as long as what is reported can be made durable."""
        intake = self.started.parts.intake
        if intake.fault:
            return Readiness(ready=False, hindrance="the journal cannot be written")
        if intake.commit_fault and not intake.has_room:
            return Readiness(ready=False, hindrance="the store is away and the journal has no room")
        if intake.commit_fault:
            return Readiness(
                ready=True, hindrance="the store is away; what is reported is in the journal"
            )
        return Readiness(ready=True)

    def drain(self) -> None:
        """Asks reporters to go on with a new stream, and ends watches."""
        if self._started is not None:
            self._started.reports.drain()
            self._started.queries.watches.drain()

    def shed_memory(self, size_bytes: int) -> int:
        """Lets go of what is kept of queries."""
        if self._started is None:
            return 0
        kept = self._started.queries.kept
        return kept.shrink(max(0, kept.size_bytes - size_bytes))

    async def close(self) -> None:
        """See ``Servicer.close``."""
        if self._started is not None:
            await self._started.alerts.close()
            await self._started.parts.close(self.measurements)

    @property
    def started(self) -> Started:
        """What there is once the service has started.

        Raises:
            MeshError: it has not yet.
        """
        if self._started is None:
            raise MeshError(
                grpc.StatusCode.UNAVAILABLE, "STARTING", "the service is starting; repeat the call"
            )
        return self._started

    # ---------------------------------------------------------------- measurements

    def report(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Takes messages of samples; acknowledges each once it is durable."""
        return self.started.reports.report(call, requests)

    async def export(self, call: Call, request: Any) -> Any:
        """Takes what OpenTelemetry exporters send."""
        return await self.started.otlp.export(call, request)

    async def query(self, call: Call, request: Any) -> Any:
        """Aggregates series over a time range."""
        return await self.started.queries.rpcs.query(call, request)

    async def list_series(self, call: Call, request: Any) -> Any:
        """Lists series."""
        return await self.started.queries.rpcs.list_series(call, request)

    async def watch(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Answers a query again and again."""
        async for response in self.started.queries.rpcs.watch(call, request):
            yield response

    def _of_alerts(self, name: str) -> UnaryHandler:
        async def handle(call: Call, request: Any) -> Any:
            return await self.started.alerts.handle(name, call, request)

        return handle

    # ---------------------------------------------------------------- audit and logs

    async def record(self, items: Sequence[Item], emit: Emit) -> None:
        """Records audit events."""
        await self.started.audit.record(items, emit)

    async def list_events(self, call: Call, request: Any) -> Any:
        """Lists audit events."""
        return await self.started.audit.list_events(call, request)

    async def verify_events(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Checks that audit events are as they were recorded."""
        async for response in self.started.audit.verify_events(call, request):
            yield response

    async def write(self, call: Call, request: Any) -> Any:
        """Keeps log records."""
        return await self.started.logs.write(call, request)

    async def write_own_logs(self, records: Sequence[LogRecord]) -> None:
        """See ``KeepsLogs.write_own_logs``."""
        await self.started.logs.write_own(records)

    async def list_records(self, call: Call, request: Any) -> Any:
        """Lists log records."""
        return await self.started.logs.list_records(call, request)
