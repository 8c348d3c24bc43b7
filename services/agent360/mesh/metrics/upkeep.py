"""What is done regularly: own measurements, coarser rollups, retention."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog

from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.measurements import LocalMeasurements
from agent360.mesh.metrics.ports import RollupStore, StoreError
from agent360.mesh.metrics.resolution import Retention
from agent360.mesh.metrics.series_table import SeriesTable

_FLUSH_EVERY_S: Final = 1.0
_COMPACT_EVERY_S: Final = 60.0
_EXPIRE_EVERY_S: Final = 600.0


class Upkeep:
    """Keeps the rollups of a service in order.

    Example:
        >>> upkeep = Upkeep(store, intake, table, measurements, retention, marks_s=86_400, log=log)
        >>> upkeep.start()
        >>> await upkeep.close()
    """

    def __init__(
        self,
        store: RollupStore,
        intake: Intake,
        table: SeriesTable,
        measurements: LocalMeasurements,
        retention: Retention,
        *,
        marks_s: float,
        others: Sequence[Callable[[], Awaitable[object]]] = (),
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._intake = intake
        self._table = table
        self._measurements = measurements
        self._retention = retention
        self._marks_s = marks_s
        self._others = others
        self._log = log
        self._now = now
        self._settled = intake.origin
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins; everything is done for the first time after its interval."""
        self._tasks = [
            asyncio.create_task(self._repeat(_FLUSH_EVERY_S, self._flush)),
            asyncio.create_task(self._repeat(_COMPACT_EVERY_S, self.compact)),
            asyncio.create_task(self._repeat(_EXPIRE_EVERY_S, self.expire)),
        ]

    async def close(self) -> None:
        """Ends."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def compact(self) -> int:
        """Computes coarser rollups of the hours that are over.

        A commit counts as settled one interval after it was seen: no query that began before it is
        still running then.

        Raises:
            StoreError: it is to be repeated.
        """
        settled, self._settled = self._settled, self._intake.origin
        return await self._store.compact(self._now(), self._intake.writer, settled)

    async def expire(self) -> None:
        """Drops what is past its retention.

        Raises:
            StoreError: it is to be repeated.
        """
        before_s = self._now() - self._marks_s
        gone = await self._store.expire(self._now(), self._retention, before_s)
        self._intake.forget_marks(before_s)
        self._table.forget(gone)
        for drop in self._others:
            await drop()

    async def _flush(self) -> None:
        await self._measurements.flush(self._intake)

    async def _repeat(self, interval_s: float, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await work()
            except StoreError as error:
                with contextlib.suppress(OSError):  # what is logged may go to the disk that is full
                    self._log.error("upkeep failed; it is repeated", error=str(error))
