"""Traces and self-reported measurements of a service."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

import grpc
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from agent360.client import AuditEvent
from agent360.client.audit import AuditClient
from agent360.mesh.runtime.call import MESH_TENANT
from agent360.mesh.runtime.red import RedKey, RedTable
from agent360.mesh.runtime.settings import TracingSettings

REPORT_EVERY_S: Final = 5.0
"""How often a service reports its calls to the metrics service."""


class Measurements(Protocol):
    """Where measurements go: the client's metrics, or the metrics service's own intake."""

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: dict[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """Adds to a counter."""

    def observe(
        self,
        name: str,
        value: float,
        labels: dict[str, str] | None = None,
        tenant: str = "",
        *,
        unit: str = "",
        count: int = 1,
    ) -> None:
        """Adds ``count`` observations of ``value`` to a distribution."""


class Tracing:
    """The service's tracer: exports over OTLP where an endpoint is set, else records nothing."""

    def __init__(self, settings: TracingSettings, service: str) -> None:
        self._provider: TracerProvider | None = None
        self.tracer: trace.Tracer = trace.NoOpTracer()
        self.enabled = bool(settings.endpoint)
        if not self.enabled:
            return
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": f"agent360-{service}"}),
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(
                    endpoint=settings.endpoint,
                    insecure=not settings.endpoint.startswith("https"),
                )
            )
        )
        self.tracer = self._provider.get_tracer("agent360.mesh")

    async def close(self) -> None:
        """Exports what is left."""
        if self._provider is not None:
            await asyncio.to_thread(self._provider.shutdown)


class SelfReport:
    """Reports a service's calls to the metrics service, by method, tenant and code.

    Series: ``mesh_requests`` (counter) and ``mesh_request_seconds`` (distribution, durations
    rounded to two significant digits). Calls that were denied are audit events, too: of their
    tenant where a limit denied them, of the mesh where somebody named a tenant that is not theirs.
    """

    def __init__(
        self, red: RedTable, measurements: Measurements, audit: AuditClient, service: str
    ) -> None:
        self._red = red
        self._measurements = measurements
        self._audit = audit
        self._service = service

    async def run(self) -> None:
        """Reports until cancelled."""
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            self.report()

    def report(self) -> None:
        """Reports what was counted since the last time."""
        for key, durations in self._red.drain().items():
            _, _, method = key.method[1:].rpartition("/")
            labels = {"service": self._service, "method": method, "code": key.code.name}
            tenant = key.tenant or MESH_TENANT
            self._measurements.count(
                "mesh_requests", float(sum(durations.values())), labels, tenant=tenant
            )
            for duration_s, count in durations.items():
                self._measurements.observe(
                    "mesh_request_seconds", duration_s, labels, tenant=tenant, unit="s", count=count
                )
            if key.code in _DENIALS:
                self._note_denial(key, sum(durations.values()))

    def _note_denial(self, key: RedKey, count: int) -> None:
        forbidden = key.code is grpc.StatusCode.PERMISSION_DENIED
        event = AuditEvent(
            "mesh.calls.deny",
            key.method[1:],
            actor=key.tenant,
            outcome="denied",
            attributes={"code": key.code.name, "count": str(count)},
        )
        self._audit.note(event, tenant=MESH_TENANT if forbidden else key.tenant or MESH_TENANT)


_DENIALS: Final = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.RESOURCE_EXHAUSTED}
