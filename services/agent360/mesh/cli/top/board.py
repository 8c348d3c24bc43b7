"""What is shown: figures of the last minutes, by service, tenant and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """Calls of a service."""

    service: str
    """Its name."""
    per_s: float
    """Calls a second."""
    errors: float
    """Share of calls that the service is to blame for, 0 to 1."""
    p50_s: float | None
    """Median duration in seconds; None: no calls."""
    p95_s: float | None
    """The 95th percentile."""
    p99_s: float | None
    """The 99th percentile."""


@dataclass(frozen=True, slots=True)
class TenantRow:
    """What a tenant does."""

    tenant: str
    """Its name."""
    per_s: float
    """Calls a second, of all services."""
    errors_per_s: float
    """Calls a second that failed and were not denied."""
    denied_per_s: float
    """Calls a second that limits or load shedding refused."""
    tokens_per_s: float
    """Tokens a second of prompts and answers together."""
    usd_per_hour: float
    """What models cost at the present rate, in US dollars an hour."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """What a model does."""

    model: str
    """Its name."""
    per_s: float
    """Answers a second, whatever their source."""
    kept: float
    """Share of answers that came from the cache or from a call in flight, 0 to 1."""
    tokens_in_per_s: float
    """Tokens of prompts a second."""
    tokens_out_per_s: float
    """Tokens of answers a second."""
    batch_size: float | None
    """Mean size of a batch; None: no calls of backends."""
    usd_per_hour: float
    """What it costs at the present rate, in US dollars an hour."""


@dataclass(frozen=True, slots=True)
class AlertRow:
    """An alert that pends or fires."""

    rule: str
    """The rule's id."""
    labels: Mapping[str, str]
    """Of the alert."""
    state: str
    """``pending`` or ``firing``."""
    value: float
    """Of the expression."""
    summary: str
    """The annotation ``summary``; empty: none."""


@dataclass(frozen=True, slots=True)
class Board:
    """One look at the mesh."""

    services: Sequence[ServiceRow]
    """The busiest first."""
    tenants: Sequence[TenantRow]
    """The busiest first."""
    models: Sequence[ModelRow]
    """The busiest first."""
    cache_hits: float | None
    """Share of the cache's lookups that were hits, 0 to 1; None: no lookups."""
    alerts: Sequence[AlertRow]
    """Firing ones first."""
    missing: Sequence[str] = ()
    """What could not be asked for, and why."""
