"""The embedded store: SQLite in WAL mode, on one thread of its own, with group commit."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from agent360.mesh.metrics.ports import AuditEvent, EventFilter, Intake
from agent360.mesh.metrics.query import Matcher
from agent360.mesh.metrics.rollup import Kind, Rollup, Sample, SeriesId, roll_up
from agent360.mesh.metrics.sketch import Sketch

T = TypeVar("T")

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS series (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, labels TEXT NOT NULL,
    kind INTEGER NOT NULL, unit TEXT NOT NULL, UNIQUE (tenant, name, labels, kind));
CREATE TABLE IF NOT EXISTS rollups (
    series INTEGER NOT NULL, bucket INTEGER NOT NULL, count INTEGER NOT NULL, total REAL NOT NULL,
    least REAL NOT NULL, most REAL NOT NULL, last REAL NOT NULL, last_time REAL NOT NULL,
    sketch BLOB NOT NULL, PRIMARY KEY (series, bucket)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS rollups_by_bucket ON rollups (bucket);
CREATE TABLE IF NOT EXISTS reporters (reporter TEXT PRIMARY KEY, sequence INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    tenant TEXT NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL, actor TEXT NOT NULL,
    action TEXT NOT NULL, resource TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (tenant, id));
CREATE INDEX IF NOT EXISTS events_by_time ON events (tenant, time, id);
CREATE INDEX IF NOT EXISTS events_by_actor ON events (tenant, actor, time, id);
CREATE INDEX IF NOT EXISTS events_by_action ON events (tenant, action, time, id);
CREATE INDEX IF NOT EXISTS events_by_resource ON events (tenant, resource, time, id);
"""


class SqliteStore:
    """The port ``Store`` on one file.

    Writes that wait while a transaction is being committed share the next one. Invariant: a
    reporter's sequence number is stored in the transaction that stores its samples.
    """

    def __init__(self, path: str, max_series_per_tenant: int) -> None:
        if path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._max_series = max_series_per_tenant
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._db: sqlite3.Connection = self._thread.submit(_open, path).result()
        self._ids: dict[SeriesId, int] = {}
        self._waiting: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self._committer: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- the port

    async def take(self, reporter_id: str, sequence: int, samples: list[Sample]) -> Intake:
        """See ``Store.take``."""
        return await self._write(lambda: self._take(reporter_id, sequence, samples))

    async def series(self, tenant: str, name: str) -> list[SeriesId]:
        """See ``Store.series``."""
        return sorted((await self._read(lambda: self._find(tenant, name))).values())

    async def rollups(
        self, tenant: str, name: str, matchers: tuple[Matcher, ...], start_s: float, end_s: float
    ) -> list[tuple[SeriesId, int, Rollup]]:
        """See ``Store.rollups``."""

        def read() -> list[tuple[SeriesId, int, Rollup]]:
            rows = []
            for number, series in self._find(tenant, name).items():
                labels = dict(series.labels)
                if not all(matcher.holds(labels) for matcher in matchers):
                    continue
                found = self._db.execute(
                    "SELECT bucket, count, total, least, most, last, last_time, sketch "
                    "FROM rollups WHERE series = ? AND bucket >= ? AND bucket < ?",
                    (number, start_s, end_s),
                )
                rows += [(series, int(row[0]), _rollup(row[1:])) for row in found]
            return rows

        return await self._read(read)

    async def record(self, event: AuditEvent) -> None:
        """See ``Store.record``."""
        await self._write(
            lambda: self._db.execute(
                "INSERT OR IGNORE INTO events (tenant, id, time, actor, action, resource, body) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                event,
            )
        )

    async def events(
        self, wanted: EventFilter, before: tuple[int, str] | None, limit: int
    ) -> list[AuditEvent]:
        """See ``Store.events``."""
        conditions, values = ["tenant = ?"], [wanted.tenant]
        bounds: list[tuple[str, Any]] = [
            ("actor = ?", wanted.actor or None),
            ("action = ?", wanted.action or None),
            ("resource = ?", wanted.resource or None),
            ("time >= ?", wanted.start_us),
            ("time < ?", wanted.end_us),
        ]
        for condition, value in bounds:
            if value is not None:
                conditions.append(condition)
                values.append(value)
        if before is not None:
            conditions.append("(time, id) < (?, ?)")
            values += before  # type: ignore[arg-type]  # SQLite takes both
        statement = (
            "SELECT tenant, id, time, actor, action, resource, body FROM events WHERE "  # noqa: S608
            + " AND ".join(conditions)
            + " ORDER BY time DESC, id DESC LIMIT ?"
        )
        rows = await self._read(lambda: self._db.execute(statement, (*values, limit)).fetchall())
        return [AuditEvent(*row) for row in rows]

    async def expire(self, before_s: float) -> None:
        """See ``Store.expire``."""
        await self._write(
            lambda: self._db.execute("DELETE FROM rollups WHERE bucket < ?", (before_s,))
        )

    async def close(self) -> None:
        """See ``Store.close``."""
        while self._committer is not None:
            await asyncio.wait((self._committer,))
        await self._read(self._db.close)
        self._thread.shutdown()

    # ---------------------------------------------------------------- on the thread

    def _take(self, reporter_id: str, sequence: int, samples: list[Sample]) -> Intake:
        row = self._db.execute(
            "SELECT sequence FROM reporters WHERE reporter = ?", (reporter_id,)
        ).fetchone()
        if row is not None and sequence <= row[0]:
            return Intake(())
        rejections: list[str] = []
        for (series, bucket), rollup in roll_up(samples).items():
            number = self._number(series)
            if number is None:
                rejections += [
                    f"{series.name}: tenant {series.tenant} has {self._max_series:,} series"
                ] * rollup.count
                continue
            self._merge(number, bucket, rollup)
        self._db.execute("REPLACE INTO reporters VALUES (?, ?)", (reporter_id, sequence))
        return Intake(tuple(rejections))

    def _merge(self, number: int, bucket: int, rollup: Rollup) -> None:
        row = self._db.execute(
            "SELECT count, total, least, most, last, last_time, sketch FROM rollups "
            "WHERE series = ? AND bucket = ?",
            (number, bucket),
        ).fetchone()
        if row is not None:
            known = _rollup(row)
            known.merge(rollup)
            rollup = known
        self._db.execute(
            "REPLACE INTO rollups VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                bucket,
                rollup.count,
                rollup.total,
                rollup.least,
                rollup.most,
                rollup.last,
                rollup.last_time_s,
                rollup.sketch.to_bytes(),
            ),
        )

    def _number(self, series: SeriesId) -> int | None:
        """The number of a series, new ones included; None if the tenant has too many."""
        number = self._ids.get(series)
        if number is not None:
            return number
        key = (series.tenant, series.name, json.dumps(series.labels), int(series.kind))
        row = self._db.execute(
            "SELECT id FROM series WHERE tenant = ? AND name = ? AND labels = ? AND kind = ?", key
        ).fetchone()
        if row is None:
            (count,) = self._db.execute(
                "SELECT count(*) FROM series WHERE tenant = ?", (series.tenant,)
            ).fetchone()
            if count >= self._max_series:
                return None
            row = self._db.execute(
                "INSERT INTO series (tenant, name, labels, kind, unit) VALUES (?, ?, ?, ?, ?) "
                "RETURNING id",
                (*key, series.unit),
            ).fetchone()
        self._ids[series] = number = int(row[0])
        return number

    def _find(self, tenant: str, name: str) -> dict[int, SeriesId]:
        statement = "SELECT id, name, labels, kind, unit FROM series WHERE tenant = ?"
        values = [tenant]
        if name:
            statement += " AND name = ?"
            values.append(name)
        return {
            number: SeriesId(
                tenant, found, tuple((k, v) for k, v in json.loads(labels)), Kind(kind), unit
            )
            for number, found, labels, kind, unit in self._db.execute(statement, values)
        }

    # ---------------------------------------------------------------- from the loop

    async def _read(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _write(self, work: Callable[[], T]) -> T:
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        if self._committer is None:
            self._committer = asyncio.create_task(self._commit_all())
        return await asyncio.shield(done)

    async def _commit_all(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                try:
                    results = await self._read(lambda group=group: self._commit(group))  # type: ignore[misc]
                except sqlite3.Error as error:
                    self._ids.clear()
                    for _, done in group:
                        if not done.cancelled():
                            done.set_exception(error)
                    continue
                for (_, done), result in zip(group, results, strict=True):
                    if not done.cancelled():
                        done.set_result(result)
        finally:
            self._committer = None

    def _commit(self, group: list[tuple[Callable[[], Any], asyncio.Future[Any]]]) -> list[Any]:
        """Runs a group of writes in one transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            results = [work() for work, _ in group]
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return results


def _rollup(row: Any) -> Rollup:
    count, total, least, most, last, last_time_s, sketch = row
    return Rollup(count, total, least, most, last, last_time_s, Sketch.from_bytes(sketch))


def _open(path: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.executescript(_SCHEMA)
    return database
