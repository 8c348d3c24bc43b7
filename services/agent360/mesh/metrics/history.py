"""Reads rollups: those in the store and those still in memory, each exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.intake import Intake
from agent360.mesh.metrics.ports import RollupStore
from agent360.mesh.metrics.queries.query import labels_of
from agent360.mesh.metrics.resolution import HOUR, RESOLUTIONS, Resolution, Retention
from agent360.mesh.metrics.series import SeriesId
from agent360.mesh.metrics.series_table import SeriesTable


class LabelCondition(Protocol):
    """A condition on the labels of a series."""

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it."""


class History:
    """The series and rollups of all tenants.

    Example:
        >>> history = History(store, table, intake, retention)
        >>> series = await history.find("acme", "plans", ())
        >>> frame = await history.read(series, start_s, end_s, step_s=60)
    """

    def __init__(
        self,
        store: RollupStore,
        table: SeriesTable,
        intake: Intake,
        retention: Retention,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._table = table
        self._intake = intake
        self._retention = retention
        self._now = now

    async def find(
        self, tenant: str | None, name: str = "", conditions: Sequence[LabelCondition] = ()
    ) -> list[SeriesId]:
        """The series that meet all conditions, in order.

        Args:
            tenant: whose; None: of all tenants, and conditions see the tenant as a label.
            name: of the metric; empty: all.
            conditions: on labels.
        """
        stored = await self._store.series(tenant, name)
        known = self._table.of(tenant, name)

        def chosen() -> list[SeriesId]:
            return sorted(
                series
                for series in {*stored, *known}
                if not conditions
                or all(each.holds(labels_of(series, tenant)) for each in conditions)
            )

        return await asyncio.to_thread(chosen)

    async def read(
        self,
        series: Sequence[SeriesId],
        start_s: float,
        end_s: float,
        step_s: float,
        *,
        bins: bool = True,
    ) -> Frame:
        """Rollups whose buckets begin within a range.

        Args:
            series: whose.
            start_s: Unix time, included.
            end_s: Unix time, not included.
            step_s: the caller will put buckets together into steps of this length that begin at
                ``start_s``; as coarse buckets are read as fit in there.
            bins: whether quantiles will be asked for; without, much less is read.

        Returns:
            Rows in no order; a series and bucket may have several: see ``Frame.regrouped``.
        """
        snapshot = self._intake.snapshot()

        def in_memory() -> list[Frame]:
            frames = (frame.within(start_s, end_s) for frame in snapshot.frames)
            return [self._table.frame_of(series, frame) for frame in frames if len(frame)]

        fresh = await asyncio.to_thread(in_memory)
        stored = [
            await self._store.read(
                series,
                begin_s,
                finish_s,
                resolution,
                writer=snapshot.writer,
                before=snapshot.before,
                bins=bins,
            )
            for resolution, begin_s, finish_s in self._portions(start_s, end_s, step_s)
        ]
        frames = [frame for frame in (*stored, *fresh) if len(frame)]
        return await asyncio.to_thread(Frame.joined, frames)

    def _portions(
        self, start_s: float, end_s: float, step_s: float
    ) -> list[tuple[Resolution, float, float]]:
        """Which resolution serves which part of a range: the coarsest that fits and is kept."""
        fitting = [
            resolution
            for resolution in RESOLUTIONS
            if step_s % resolution.length_s == 0 and start_s % resolution.length_s == 0
        ]
        place = RESOLUTIONS.index(fitting[-1]) if fitting else 0
        portions = []
        for resolution in RESOLUTIONS[place:]:
            kept_s = self._now() - self._retention.of(resolution)
            kept_s = max(start_s, kept_s // HOUR.length_s * HOUR.length_s)
            if resolution is RESOLUTIONS[-1]:
                kept_s = start_s
            if kept_s < end_s:
                portions.append((resolution, kept_s, end_s))
                end_s = kept_s
            if end_s <= start_s:
                break
        return portions
