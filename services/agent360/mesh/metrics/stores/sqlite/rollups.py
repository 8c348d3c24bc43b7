"""Series and rollups on SQLite."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Final, NamedTuple

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Checkpoint, Commit, Mark
from agent360.mesh.metrics.resolution import FINE, Resolution, Retention
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.metrics.stores.blobs import blocks_of
from agent360.mesh.metrics.stores.sqlite.compaction import HourCompaction, hours_to_compact
from agent360.mesh.metrics.stores.sqlite.database import Database
from agent360.mesh.metrics.stores.sqlite.partitions import drop_expired, ensure
from agent360.mesh.metrics.stores.sqlite.reading import Wanted, read_frame
from agent360.mesh.metrics.stores.sqlite.schema import MIGRATIONS

_DAY_S: Final = 86_400
_UNKNOWN: Final = -1
"""No writer; 0 stands for rows that were put together."""


class Written(NamedTuple):
    """What a commit found out; true once its transaction is done."""

    numbers: dict[SeriesId, int]
    days: dict[int, int]
    """The last day with rollups, by number of the series."""


class SqliteRollupStore:
    """The port ``RollupStore``; a commit is one transaction."""

    def __init__(self, database: Database) -> None:
        """Makes the tables, or brings them up to date.

        Raises:
            StoreError: the file cannot be used, or is of a later version.
        """
        database.migrate("rollups", MIGRATIONS)
        self.database = database
        """The file that it is in."""
        self._numbers: dict[SeriesId, int] = {}
        self._days: dict[int, int] = {}

    async def series(self, tenant: str | None = None, name: str = "") -> list[SeriesId]:
        """See ``RollupStore.series``."""
        conditions = {"tenant = ?": tenant, "name = ?": name or None}
        given = {text: value for text, value in conditions.items() if value is not None}
        statement = "SELECT tenant, name, labels, kind, unit FROM series" + (  # noqa: S608
            " WHERE " + " AND ".join(given) if given else ""
        )
        return await self.database.read(
            lambda db: [_series_id(*row) for row in db.execute(statement, tuple(given.values()))]
        )

    async def checkpoint(self, writer: str) -> Checkpoint:
        """See ``RollupStore.checkpoint``."""

        def read(db: sqlite3.Connection) -> Checkpoint:
            row = db.execute("SELECT position FROM writers WHERE name = ?", (writer,)).fetchone()
            marks = db.execute("SELECT name, value, time FROM marks").fetchall()
            return Checkpoint(
                row[0] if row else 0, {name: Mark(value, time_s) for name, value, time_s in marks}
            )

        return await self.database.read(read)

    async def commit(self, commit: Commit) -> None:
        """See ``RollupStore.commit``."""
        written = await self.database.write(lambda db: self.write(db, commit))
        self._numbers.update(written.numbers)
        self._days.update(written.days)

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

        def read(db: sqlite3.Connection) -> Frame:
            places = {
                number: place
                for place, each in enumerate(series)
                if (number := self._known_number(db, each)) is not None
            }
            wanted = Wanted(
                series, places, start_s, end_s, _writer_number(db, writer), before, bins
            )
            return read_frame(db, wanted, resolution)

        return await self.database.read(read)

    async def compact(self, now_s: float, writer: str, settled: int) -> int:
        """See ``RollupStore.compact``."""
        hours = await self.database.read(
            lambda db: hours_to_compact(db, now_s, _writer_number(db, writer), settled)
        )
        for hour in hours:
            compaction = HourCompaction(hour)
            while await self.database.write(compaction.next_slice):
                pass
            await self.database.write(compaction.finish)
        return len(hours)

    async def expire(
        self, now_s: float, retention: Retention, marks_before_s: float
    ) -> list[SeriesId]:
        """See ``RollupStore.expire``."""
        before_day = int(now_s - max(retention.fine_s, retention.minute_s, retention.hour_s))
        before_day = before_day // _DAY_S - 1

        def write(db: sqlite3.Connection) -> list[SeriesId]:
            drop_expired(db, now_s, retention)
            db.execute("DELETE FROM marks WHERE time < ?", (marks_before_s,))
            gone = db.execute(
                "DELETE FROM series WHERE last_day < ? RETURNING tenant, name, labels, kind, unit",
                (before_day,),
            ).fetchall()
            self._numbers.clear()
            self._days.clear()
            return [_series_id(*row) for row in gone]

        return await self.database.write(write)

    # ---------------------------------------------------------------- on the writing thread

    def write(self, db: sqlite3.Connection, commit: Commit) -> Written:
        """The statements of a commit, in the caller's transaction, which may yet fail."""
        written = Written({}, {})
        db.execute(
            "INSERT INTO writers (name, position) VALUES (?1, ?2) "
            "ON CONFLICT (name) DO UPDATE SET position = ?2",
            (commit.writer, commit.position),
        )
        writer = _writer_number(db, commit.writer)
        rows: dict[int, list[tuple[int, int, int, int, bytes, bytes]]] = {}
        numbers: dict[int, int] = {}
        for block in blocks_of(commit.frame, FINE.block_s):
            number = numbers.get(block.series)
            if number is None:
                series = commit.frame.series[block.series]
                number = numbers[block.series] = self._number(db, series, written)
            self._touch(db, number, block.start_s // _DAY_S, written)
            rows.setdefault(block.start_s, []).append(
                (block.start_s, number, writer, commit.origin, block.rows, block.bins)
            )
        for start_s, blocks in rows.items():
            table = ensure(db, FINE, start_s)
            db.executemany(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?)", blocks)  # noqa: S608
            db.execute(
                "REPLACE INTO open_blocks (block, writer, origin) VALUES (?, ?, ?)",
                (start_s, writer, commit.origin),
            )
        db.executemany(
            "REPLACE INTO marks (name, value, time) VALUES (?, ?, ?)",
            [(name, mark.value, mark.time_s) for name, mark in commit.marks.items()],
        )
        return written

    def _number(self, db: sqlite3.Connection, series: SeriesId, written: Written) -> int:
        number = self._known_number(db, series)
        if number is None:
            (number,) = db.execute(
                "INSERT INTO series (tenant, name, labels, kind, unit, last_day) "
                "VALUES (?, ?, ?, ?, ?, 0) RETURNING id",
                _key(series),
            ).fetchone()
        written.numbers[series] = number
        return int(number)

    def _known_number(self, db: sqlite3.Connection, series: SeriesId) -> int | None:
        number = self._numbers.get(series)
        if number is None:
            row = db.execute(
                "SELECT id FROM series "
                "WHERE tenant = ? AND name = ? AND labels = ? AND kind = ? AND unit = ?",
                _key(series),
            ).fetchone()
            number = row[0] if row else None
        return number

    def _touch(self, db: sqlite3.Connection, number: int, day: int, written: Written) -> None:
        """Notes the last day that a series has rollups of."""
        if max(self._days.get(number, 0), written.days.get(number, 0)) < day:
            db.execute(
                "UPDATE series SET last_day = ?2 WHERE id = ?1 AND last_day < ?2", (number, day)
            )
            written.days[number] = day


def _key(series: SeriesId) -> tuple[str, str, str, int, str]:
    labels = json.dumps(series.labels)
    return series.tenant, series.name, labels, int(series.kind), series.unit


def _series_id(tenant: str, name: str, labels: str, kind: int, unit: str) -> SeriesId:
    return SeriesId(
        tenant, name, tuple((key, value) for key, value in json.loads(labels)), Kind(kind), unit
    )


def _writer_number(db: sqlite3.Connection, name: str) -> int:
    row = db.execute("SELECT id FROM writers WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else _UNKNOWN
