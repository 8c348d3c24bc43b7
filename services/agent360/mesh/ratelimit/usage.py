"""Usage over time: what was allowed and denied, told to the metrics service."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final, Protocol

from agent360.mesh.ratelimit.decisions import Decision

_REPORT_EVERY_S: Final = 5.0
_MAX_ROWS: Final = 10_000


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

    ``ratelimit_hits_total{limit,outcome,hour}`` of each tenant answers when a limit is used, and
    its sum over all which tenants use the most. Looks (0 hits) are not counted.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._sums: dict[tuple[str, str, bool], int] = {}
        self._task: asyncio.Task[None] | None = None

    def note(self, tenant: str, decision: Decision, hits: int) -> None:
        """Adds a decision."""
        limit_id = decision[6]
        if not limit_id or not hits:
            return
        sums, allowed = self._sums, decision[0]
        key = (tenant, limit_id, allowed)
        sums[key] = sums.get(key, 0) + (decision[1] if allowed else hits)

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
        sums, self._sums = self._sums, {}
        hour = f"{datetime.now(UTC).hour:02}"
        for (tenant, limit_id, allowed), hits in list(sums.items())[:_MAX_ROWS]:
            labels = {
                "limit": limit_id,
                "outcome": "allowed" if allowed else "denied",
                "hour": hour,
            }
            self._meter.count("ratelimit_hits_total", hits, labels, tenant)
