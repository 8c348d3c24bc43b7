"""Usage over time: what was allowed and denied, told to the metrics service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Protocol

from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.runtime.call import MESH_TENANT

_REPORT_EVERY_S: Final = 5.0
_MAX_ROWS: Final = 10_000
"""Rows of one report; the others wait for the next."""
_MAX_WAITING: Final = 200_000


class Meter(Protocol):
    """Takes measurements: ``agent360.client.MetricsClient``."""

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: Mapping[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        """Adds to a counter."""


class UsageReport:
    """Adds decisions up and reports the sums every few seconds, by tenant, limit and hour of day.

    ``ratelimit_hits_total{limit,outcome,hour}`` of each tenant answers when a limit is used. The
    same of the mesh's own tenant has a label ``tenant`` as well: grouped by it, operators see which
    tenants use the most. Looks (0 hits) are not counted.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._sums: dict[tuple[str, str, bool], int] = {}
        self._task: asyncio.Task[None] | None = None

    def note(self, tenant: str, decision: Decision, hits: int) -> None:
        """Adds a decision."""
        allowed = decision.allowed
        self.add(tenant, decision.limit_id, allowed, decision.granted if allowed else hits)

    def add(self, tenant: str, limit_id: str, allowed: bool, hits: int) -> None:
        """Adds hits that were granted, or asked for and denied."""
        if not limit_id or not hits:
            return
        sums, key = self._sums, (tenant, limit_id, allowed)
        if len(sums) >= _MAX_WAITING and key not in sums:
            return
        sums[key] = sums.get(key, 0) + hits

    def start(self) -> None:
        """Reports from now on."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Reports what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
        self._report()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            self._report()

    def _report(self) -> None:
        rows = [(key, self._sums.pop(key)) for key in list(self._sums)[:_MAX_ROWS]]
        hour = f"{datetime.now(UTC).hour:02}"
        for (tenant, limit_id, allowed), hits in rows:
            labels = {
                "limit": limit_id,
                "outcome": "allowed" if allowed else "denied",
                "hour": hour,
            }
            self._meter.count("ratelimit_hits_total", hits, labels, tenant)
            self._meter.count(
                "ratelimit_hits_total", hits, {**labels, "tenant": tenant}, MESH_TENANT
            )
