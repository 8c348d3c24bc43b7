"""Tells the metrics service of lookups, by tenant and outcome."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from agent360.client.metrics import MetricsClient
from agent360.mesh.cache.entry import Space

EVERY_S: Final = 5.0
"""How often it is told."""

LOOKUPS: Final = "cache_lookups_total"
"""Name of the series; its label ``outcome`` is hit, shared_hit, stale or miss."""


class LookupReport:
    """Reports what was counted since the last time.

    Example:
        >>> report = LookupReport(service.all_spaces, context.mesh.metrics)
        >>> task = asyncio.create_task(report.run())
    """

    def __init__(self, spaces: Callable[[], Iterable[Space]], metrics: MetricsClient) -> None:
        """Prepares a report.

        Args:
            spaces: gives all namespaces.
            metrics: where to report.
        """
        self._spaces = spaces
        self._metrics = metrics
        self._told: Counter[tuple[str, str]] = Counter()

    async def run(self) -> None:
        """Reports until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.report()

    def report(self) -> None:
        """Reports once."""
        counted: Counter[tuple[str, str]] = Counter()
        for space in self._spaces():
            counts = space.counts
            for outcome, count in (
                ("hit", counts.hits),
                ("shared_hit", counts.shared_hits),
                ("stale", counts.stale_hits),
                ("miss", counts.misses),
            ):
                counted[space.tenant, outcome] += count
        for (tenant, outcome), count in counted.items():
            # A namespace that is gone took its counts along.
            fresh = count - self._told[tenant, outcome]
            if fresh > 0:
                self._metrics.count(LOOKUPS, float(fresh), {"outcome": outcome}, tenant)
        self._told = counted
