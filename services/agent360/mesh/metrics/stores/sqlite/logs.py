"""Log records on SQLite: a table for each UTC day, dropped whole."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from agent360.mesh.metrics.ports import LogFilter, LogPage, LogRecord, Position
from agent360.mesh.metrics.stores.sqlite.database import Database
from agent360.mesh.metrics.stores.sqlite.events import MAX_ROWS_READ, Statement
from agent360.mesh.metrics.stores.sqlite.migrations import script

_MIGRATIONS: Final = (script("CREATE TABLE log_days (day INTEGER PRIMARY KEY);"),)
_DAY_US: Final = 86_400 * 1_000_000
_COLUMNS: Final = "tenant, id, time, level, service, pattern, trace_id, body"
_INDEXES: Final = {
    "by_trace": "(trace_id, time, id) WHERE trace_id <> ''",
    "by_tenant_service": "(tenant, service, time, id)",
    "by_tenant": "(tenant, time, id)",
    "by_service": "(service, time, id)",
}


def list_statement(day: int, wanted: LogFilter, before: Position | None, limit: int) -> Statement:
    """Reads records of a day by the index that fits the filter best; see ``LogStore.records``."""
    conditions: list[tuple[str, Any]] = []
    index = ""
    if wanted.trace_id:
        index = "by_trace"
        conditions += [("trace_id = ?", wanted.trace_id)]
    else:
        if wanted.tenant is not None:
            index = "by_tenant"
            conditions += [("tenant = ?", wanted.tenant)]
        if wanted.service:
            index = f"{index}_service" if index else "by_service"
            conditions += [("service = ?", wanted.service)]
    if wanted.start_us is not None:
        conditions += [("time >= ?", wanted.start_us)]
    if wanted.end_us is not None:
        conditions += [("time < ?", wanted.end_us)]
    texts = [text for text, _ in conditions]
    values = [value for _, value in conditions]
    if wanted.trace_id:
        texts.append("trace_id <> ''")
    if before is not None:
        texts.append("(time, id) < (?, ?)")
        values += before
    table = _table(day)
    source = f"{table} INDEXED BY {table}_{index}" if index else table
    where = f"WHERE {' AND '.join(texts)} " if texts else ""
    sql = f"SELECT {_COLUMNS} FROM {source} {where}ORDER BY time DESC, id DESC LIMIT ?"  # noqa: S608
    return Statement(sql, (*values, limit))


class SqliteLogStore:
    """The port ``LogStore``."""

    def __init__(self, database: Database) -> None:
        database.migrate("logs", _MIGRATIONS)
        self._database = database

    async def write(self, records: Sequence[LogRecord], keep_s: float) -> None:
        """See ``LogStore.write``."""
        del keep_s  # days are dropped
        by_day: dict[int, list[LogRecord]] = {}
        for record in records:
            by_day.setdefault(record.time_us // _DAY_US, []).append(record)

        def write(db: sqlite3.Connection) -> None:
            for day, group in by_day.items():
                _ensure(db, day)
                db.executemany(
                    f"INSERT OR IGNORE INTO {_table(day)} ({_COLUMNS}) "  # noqa: S608
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    group,
                )

        await self._database.write(write)

    async def records(self, wanted: LogFilter, before: Position | None, limit: int) -> LogPage:
        """See ``LogStore.records``."""

        def read(db: sqlite3.Connection) -> LogPage:
            found: list[LogRecord] = []
            last: LogRecord | None = None
            for count, record in enumerate(_walk(db, wanted, before)):
                if last is not None and (len(found) == limit or count == MAX_ROWS_READ):
                    return LogPage(found, Position(last.time_us, last.record_id))
                last = record
                if _meets(wanted, record):
                    found.append(record)
            return LogPage(found, None)

        return await self._database.read(read)

    async def drop(self, before_us: int) -> None:
        """See ``LogStore.drop``."""

        def write(db: sqlite3.Connection) -> None:
            gone = db.execute(
                "SELECT day FROM log_days WHERE day < ?", (before_us // _DAY_US,)
            ).fetchall()
            for (day,) in gone:
                db.execute(f"DROP TABLE {_table(day)}")
                db.execute("DELETE FROM log_days WHERE day = ?", (day,))

        await self._database.write(write)


def _walk(
    db: sqlite3.Connection, wanted: LogFilter, before: Position | None
) -> Iterator[LogRecord]:
    """Records that meet what the index serves, the newest first, a day's table after the other."""
    first, last = 0, 2**62
    if wanted.start_us is not None:
        first = wanted.start_us // _DAY_US
    if wanted.end_us is not None:
        last = (wanted.end_us - 1) // _DAY_US
    if before is not None:
        last = min(last, before.time_us // _DAY_US)
    days = db.execute(
        "SELECT day FROM log_days WHERE day BETWEEN ? AND ? ORDER BY day DESC", (first, last)
    ).fetchall()
    for (day,) in days:
        sql, values = list_statement(day, wanted, before, MAX_ROWS_READ + 1)
        for row in db.execute(sql, values):
            yield LogRecord(*row)


def _meets(wanted: LogFilter, record: LogRecord) -> bool:
    return (
        wanted.tenant in (None, record.tenant)
        and wanted.level <= record.level
        and wanted.service in ("", record.service)
        and wanted.pattern in ("", record.pattern)
    )


def _table(day: int) -> str:
    return f"logs_{datetime.fromtimestamp(day * 86_400, UTC):%Y%m%d}"


def _ensure(db: sqlite3.Connection, day: int) -> None:
    table = _table(day)
    if db.execute("INSERT OR IGNORE INTO log_days (day) VALUES (?)", (day,)).rowcount == 0:
        return
    db.execute(
        f"CREATE TABLE {table} (tenant TEXT NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL, "
        "level INTEGER NOT NULL, service TEXT NOT NULL, pattern TEXT NOT NULL, "
        "trace_id TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (time, id)) WITHOUT ROWID"
    )
    for name, columns in _INDEXES.items():
        db.execute(f"CREATE INDEX {table}_{name} ON {table} {columns}")
