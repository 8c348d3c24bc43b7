"""Usage records, told to the metrics service and to the audit log."""

from __future__ import annotations

import uuid
from typing import Literal, Protocol

from agent360.client import AuditEvent, Mesh
from agent360.client.audit import OutcomeName
from agent360.mesh.inference.ports import UsageRecord


class UsageLog(Protocol):
    """Takes usage records. Never blocks, never raises."""

    def note(self, record: UsageRecord) -> None:
        """Takes one record."""


class NoUsageLog:
    """The port where no records are wanted."""

    def note(self, record: UsageRecord) -> None:
        """See ``UsageLog.note``."""


class UsageSums:
    """Adds records up in the metrics service, by tenant and model."""

    def __init__(self, mesh: Mesh) -> None:
        self._metrics = mesh.metrics

    def note(self, record: UsageRecord) -> None:
        """See ``UsageLog.note``."""
        metrics, tenant, model = self._metrics, record.payer.tenant, record.payer.model
        source = record.source.value if record.source is not None else "none"
        labels = {"model": model, "outcome": record.outcome, "source": source}
        metrics.count("inference_usage_requests_total", labels=labels, tenant=tenant)
        of_model = {"model": model}
        if record.charged_tokens:
            metrics.count("inference_usage_tokens_total", record.charged_tokens, of_model, tenant)
        if record.charged_usd:
            metrics.count("inference_usage_usd_total", record.charged_usd, of_model, tenant)


class UsageEvents:
    """Adds records up, and writes each into its tenant's audit log.

    The client notes events in the background and at most so many at a time; what it cannot take is
    counted (``inference_usage_lost_total``), and no request waits for it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sums = UsageSums(mesh)
        self._audit = mesh.audit
        self._metrics = mesh.metrics
        self._lost = 0

    def note(self, record: UsageRecord) -> None:
        """See ``UsageLog.note``."""
        self._sums.note(record)
        self._audit.note(_event(record), tenant=record.payer.tenant)
        lost, self._lost = self._audit.lost - self._lost, self._audit.lost
        if lost:
            self._metrics.count("inference_usage_lost_total", lost, tenant=record.payer.tenant)


def usage_log(mesh: Mesh, records: Literal["none", "metrics", "audit"]) -> UsageLog:
    """The log that the settings ask for."""
    if records == "none":
        return NoUsageLog()
    return UsageEvents(mesh) if records == "audit" else UsageSums(mesh)


def _event(record: UsageRecord) -> AuditEvent:
    facts = {
        "reason": "" if record.outcome == "OK" else record.outcome,
        "source": record.source.value if record.source is not None else "",
        "backend": record.backend,
        "rule": record.rule,
        "request_id": record.request_id,
        "charged_tokens": str(record.charged_tokens),
        "charged_usd": f"{record.charged_usd:.9f}",
        "total_ms": f"{record.total_s * 1e3:.1f}",
    }
    if record.usage is not None:
        facts["input_tokens"] = str(record.usage.input_tokens)
        facts["output_tokens"] = str(record.usage.output_tokens)
        facts["estimated"] = "true" if record.usage.estimated else ""
    return AuditEvent(
        action=f"inference.{record.method}",
        resource=f"models/{record.payer.model or 'unknown'}",
        actor=record.payer.user,
        outcome=_outcome(record.outcome),
        attributes={name: value for name, value in facts.items() if value},
        event_id=str(uuid.uuid4()),
    )


def _outcome(outcome: str) -> OutcomeName:
    if outcome == "OK":
        return "succeeded"
    return "denied" if outcome == "RATE_LIMITED" else "failed"
