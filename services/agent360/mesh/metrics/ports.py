"""What the metrics service needs of a store."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from agent360.mesh.metrics.query import Matcher
from agent360.mesh.metrics.rollup import Rollup, Sample, SeriesId


class Intake(NamedTuple):
    """What became of a message of samples."""

    rejections: tuple[str, ...]
    """Why samples were refused, one text for each."""


class AuditEvent(NamedTuple):
    """Something that was done; ``body`` is all of it in the store's own form."""

    tenant: str
    event_id: str
    time_us: int
    actor: str
    action: str
    resource: str
    body: bytes


class EventFilter(NamedTuple):
    """Which events are meant; empty texts stand for any."""

    tenant: str
    start_us: int | None
    end_us: int | None
    actor: str
    action: str
    resource: str


class Store(Protocol):
    """Keeps rollups and events. What a method was awaited for is durable."""

    async def take(self, reporter_id: str, sequence: int, samples: list[Sample]) -> Intake:
        """Adds samples once: a sequence number that is not above the reporter's last is known."""

    async def series(self, tenant: str, name: str) -> list[SeriesId]:
        """A tenant's series, in order; all names if ``name`` is empty."""

    async def rollups(
        self, tenant: str, name: str, matchers: tuple[Matcher, ...], start_s: float, end_s: float
    ) -> list[tuple[SeriesId, int, Rollup]]:
        """Rollups whose buckets begin within the range."""

    async def record(self, event: AuditEvent) -> None:
        """Keeps an event; a second one of the same tenant and id changes nothing."""

    async def events(
        self, wanted: EventFilter, before: tuple[int, str] | None, limit: int
    ) -> list[AuditEvent]:
        """Events, the newest first, older than ``before`` (time and id)."""

    async def expire(self, before_s: float) -> None:
        """Drops rollups of buckets that began before."""

    async def close(self) -> None:
        """Finishes what was asked for."""
