"""Series and rollups on Cassandra."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Checkpoint, Commit, Mark
from agent360.mesh.metrics.resolution import FINE, RESOLUTIONS, Resolution, Retention
from agent360.mesh.metrics.series import SeriesId
from agent360.mesh.metrics.stores.blobs import frame_of
from agent360.mesh.metrics.stores.cassandra.compaction import compact_hour
from agent360.mesh.metrics.stores.cassandra.hours import Hours
from agent360.mesh.metrics.stores.cassandra.lease import Lease
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.registry import DAY_S, Registry, key_of, shard_of
from agent360.mesh.metrics.stores.cassandra.rows import (
    Span,
    Wanted,
    fine_writes,
    reads,
)
from agent360.mesh.metrics.stores.cassandra.schema import SHARDS
from agent360.mesh.metrics.stores.cassandra.session import Batch, Session, Statement

_WRITE_MARK: Final = (
    "INSERT INTO marks (writer, shard, name, value, time_s) VALUES (?, ?, ?, ?, ?) "
    "USING TIMESTAMP ? AND TTL ?"
)
_MARKS: Final = "SELECT name, value, time_s FROM marks WHERE writer = ? AND shard = ?"
_WRITE_POSITION: Final = (
    "INSERT INTO writers (writer, position) VALUES (?, ?) USING TIMESTAMP ? AND TTL ?"
)
_POSITION: Final = "SELECT position FROM writers WHERE writer = ?"
_MARKS_AT_ONCE: Final = 50
_COMPACTION_S: Final = 120
_DAYS: Final = 1 << 24
"""More than there are days in two thousand years."""
_MOST_KEYS: Final = 100_000

_Found = tuple[Any, ...]
"""Number of a series, rows, bins or None and, of the finest, writer and origin."""


class CassandraRollupStore:
    """The port ``RollupStore``.

    A commit is many writes, made in an order in which it may be interrupted anywhere: series, that
    its hours are open, rows, that they are complete, marks, position. Until the position is
    written it is repeated, and overwrites what it wrote before.
    """

    def __init__(self, session: Session, lifetimes: Lifetimes) -> None:
        """Uses the tables of ``schema``."""
        self._session = session
        self._lifetimes = lifetimes
        self._registry = Registry(session, lifetimes)
        self._hours = Hours(session, lifetimes)
        self._keys: dict[SeriesId, bytes] = {}
        self._floors_s: dict[Resolution, float] = {}
        self._marks_before_s = 0.0

    async def series(self, tenant: str | None = None, name: str = "") -> list[SeriesId]:
        """See ``RollupStore.series``."""
        return [known.series for known in await self._registry.read(tenant, name)]

    async def checkpoint(self, writer: str) -> Checkpoint:
        """See ``RollupStore.checkpoint``."""
        (position, *shards) = await self._session.run_all(
            [
                Statement(_POSITION, (writer,)),
                *(Statement(_MARKS, (writer, shard)) for shard in range(SHARDS)),
            ]
        )
        marks = {
            name: Mark(value, time_s)
            for rows in shards
            for name, value, time_s in rows
            if time_s >= self._marks_before_s
        }
        return Checkpoint((position[0][0] or 0) if position else 0, marks)

    async def commit(self, commit: Commit) -> None:
        """See ``RollupStore.commit``."""
        frame = commit.frame
        if len(frame):
            days = np.unique(frame.row_series * _DAYS + frame.bucket_s // DAY_S).tolist()
            await self._registry.note((frame.series[each // _DAYS], each % _DAYS) for each in days)
            hours = np.unique(frame.bucket_s // FINE.block_s * FINE.block_s).tolist()
            await self._hours.touch(commit, hours, done=False)
            used = np.unique(frame.row_series).tolist()
            keys = {number: self._key(frame.series[number]) for number in used}
            writes = await asyncio.to_thread(fine_writes, commit, keys, self._lifetimes)
            await self._session.run_all(writes)
            await self._hours.touch(commit, hours, done=True)
        await self._session.run_all(self._mark_writes(commit))
        lifetime = self._lifetimes.of_series(self._lifetimes.now())
        await self._session.run(
            Statement(_WRITE_POSITION, (commit.writer, commit.position, commit.position, lifetime))
        )

    async def read(
        self,
        series: Sequence[SeriesId],
        start_s: float,
        end_s: float,
        resolution: Resolution,
        *,
        writer: str,
        before: int,
        bins: bool = True,
    ) -> Frame:
        """See ``RollupStore.read``."""
        wanted = [Wanted(each.tenant, self._key(each), n) for n, each in enumerate(series)]
        span = Span(start_s, end_s)
        own = (writer, before)
        if resolution is FINE:
            blocks = await self._read_fine(wanted, [span], own, bins=bins)
            return await self._shown(series, blocks, FINE, span)
        open_hours = [hour.start_s for hour in await self._hours.open_within(start_s, end_s)]
        blocks = await self._read(wanted, resolution, [span], bins=bins)
        coarse = await self._shown(series, blocks, resolution, span)
        is_open = np.isin(coarse.bucket_s // FINE.block_s * FINE.block_s, open_hours)
        spans = [Span(hour, hour + FINE.block_s) for hour in open_hours]
        blocks = await self._read_fine(wanted, spans, own, bins=bins)
        fine = await self._shown(series, blocks, FINE, span)
        return Frame.joined((coarse.chosen(~is_open), fine))

    async def compact(self, now_s: float, writer: str, settled: int) -> int:
        """See ``RollupStore.compact``; one process at a time does it for all."""
        await self._hours.settle(now_s, writer, settled)
        due = await self._hours.due(now_s, writer, settled)
        lease = Lease(self._session, "compaction", lasts_s=_COMPACTION_S)
        if not due or not await lease.take():
            return 0
        try:
            known = await self._registry.read()
            for hour in due:
                await compact_hour(self._session, self._lifetimes, hour, known)
                await self._hours.note_computed(hour)
                await lease.renew()
        finally:
            await lease.give_back()
        return len(due)

    async def expire(
        self, now_s: float, retention: Retention, marks_before_s: float
    ) -> list[SeriesId]:
        """See ``RollupStore.expire``.

        What is past its retention is not shown from then on. It is gone from the disk when its
        time to live ends: Cassandra drops files whose rows have all ended.
        """
        oldest = await self._hours.open_within(0, now_s)
        for resolution in RESOLUTIONS:
            floor_s = (now_s - retention.of(resolution)) // DAY_S * DAY_S
            if resolution is FINE and oldest:
                floor_s = min(floor_s, oldest[0].start_s)
            self._floors_s[resolution] = max(floor_s, self._floors_s.get(resolution, 0.0))
        self._marks_before_s = max(self._marks_before_s, marks_before_s)
        longest_s = max(retention.fine_s, retention.minute_s, retention.hour_s)
        return await self._registry.forget_before(int((now_s - longest_s) // DAY_S) - 1)

    def _mark_writes(self, commit: Commit) -> list[Statement | Batch]:
        shards: dict[int, list[Statement]] = {}
        for name, mark in commit.marks.items():
            shard = shard_of(name)
            lifetime = self._lifetimes.of_mark(mark.time_s)
            values = (commit.writer, shard, name, *mark, commit.position, lifetime)
            shards.setdefault(shard, []).append(Statement(_WRITE_MARK, values))
        return [
            Batch(writes[place : place + _MARKS_AT_ONCE])
            for writes in shards.values()
            for place in range(0, len(writes), _MARKS_AT_ONCE)
        ]

    async def _read_fine(
        self, wanted: Sequence[Wanted], spans: Sequence[Span], own: tuple[str, int], *, bins: bool
    ) -> list[_Found]:
        """Without the rows that the caller has in memory."""
        writer, before = own
        return [
            found
            for found in await self._read(wanted, FINE, spans, bins=bins)
            if found[3] != writer or found[4] < before
        ]

    async def _read(
        self, wanted: Sequence[Wanted], resolution: Resolution, spans: Sequence[Span], *, bins: bool
    ) -> list[_Found]:
        requests = [
            (each.place, statement)
            for span in spans
            for each in wanted
            for statement in reads(each, resolution, span, bins=bins)
        ]
        answers = await self._session.run_all([statement for _, statement in requests])
        without: tuple[None, ...] = () if bins else (None,)
        return [
            (place, row[0], *without, *row[1:])
            for (place, _), rows in zip(requests, answers, strict=True)
            for row in rows
        ]

    async def _shown(
        self,
        series: Sequence[SeriesId],
        found: Sequence[_Found],
        resolution: Resolution,
        span: Span,
    ) -> Frame:
        """The rollups within a range that are not past their retention."""
        start_s = max(span.start_s, self._floors_s.get(resolution, 0.0))

        def frame() -> Frame:
            return frame_of(series, [row[:3] for row in found]).within(start_s, span.end_s)

        return await asyncio.to_thread(frame)

    def _key(self, series: SeriesId) -> bytes:
        key = self._keys.get(series)
        if key is None:
            if len(self._keys) >= _MOST_KEYS:
                self._keys.clear()
            key = self._keys[series] = key_of(series)
        return key
