"""Log records on Cassandra: a table for each way of looking for them, which expire.

Each record is written whole into every one of them. Partitions are an hour of a tenant, a service,
both, or of all; those of a trace hold all of it. Which hours there are says a table of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from agent360.mesh.metrics.ports import LogFilter, LogPage, LogRecord, Position
from agent360.mesh.metrics.stores.cassandra.lifetimes import ttl_until
from agent360.mesh.metrics.stores.cassandra.listing import page
from agent360.mesh.metrics.stores.cassandra.session import Batch, Row, Session, Statement

_HOUR_US: Final = 3_600_000_000
_LAST_HOUR: Final = 1 << 40
_SECOND_US: Final = 1_000_000
_KEPT: Final = "time_us, id, tenant, level, service, pattern, trace_id, body"
_TYPES: Final = """time_us bigint, id text, tenant text, level int, service text, pattern text,
    trace_id text, body blob"""
_KEYS: Final = {
    "trace": "trace_id",
    "tenant_service": "tenant, service",
    "tenant": "tenant",
    "service": "service",
    "time": "",
}
"""The columns of the partitions, by way, the most selective first."""

MIGRATIONS: Final = (
    (
        """CREATE TABLE IF NOT EXISTS log_hours (
        way text, key text, hour bigint, PRIMARY KEY ((way, key), hour))
        WITH CLUSTERING ORDER BY (hour DESC)""",
        *(
            f"""CREATE TABLE IF NOT EXISTS logs_by_{way} (hour bigint, {_TYPES}, PRIMARY KEY (
            ({", ".join(part for part in (key, "" if way == "trace" else "hour") if part)}),
            time_us, id)) WITH CLUSTERING ORDER BY (time_us DESC, id DESC)
            AND compaction = {{'class': 'TimeWindowCompactionStrategy'}}"""
            for way, key in _KEYS.items()
        ),
    ),
)
"""Of the subject ``logs``."""

_WRITE_HOUR: Final = "INSERT INTO log_hours (way, key, hour) VALUES (?, ?, ?) USING TTL ?"
_HOURS: Final = "SELECT hour FROM log_hours WHERE way = ? AND key = ? AND hour >= ? AND hour <= ?"
_WRITES: Final = {
    way: f"INSERT INTO logs_by_{way} (hour, {_KEPT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) USING TTL ?"
    for way in _KEYS
}


class _Way(NamedTuple):
    """A table and the values that its partitions are of."""

    name: str
    values: tuple[str, ...]


class CassandraLogStore:
    """The port ``LogStore``."""

    def __init__(self, session: Session) -> None:
        """Uses the tables of ``MIGRATIONS``."""
        self._session = session

    async def write(self, records: Sequence[LogRecord], keep_s: float) -> None:
        """See ``LogStore.write``."""
        hours: dict[tuple[str, str, int], int] = {}
        rows: list[Statement | Batch] = []
        for record in records:
            ttl = ttl_until(record.time_us / _SECOND_US + keep_s)
            hour = record.time_us // _HOUR_US
            for way in _ways_of(record):
                if way.name != "trace":
                    hours[way.name, _key(way), hour] = ttl + 3_600
                rows.append(Statement(_WRITES[way.name], (hour, *_values(record), ttl)))
        await self._session.run_all(
            [Statement(_WRITE_HOUR, (*hour, ttl)) for hour, ttl in hours.items()]
        )
        await self._session.run_all(rows)

    async def records(self, wanted: LogFilter, before: Position | None, limit: int) -> LogPage:
        """See ``LogStore.records``."""
        way = _way_to(wanted)
        selections = [
            partial(_selection, way, wanted, hour, limit)
            for hour in await self._hours(way, wanted, before)
        ]

        def read(row: Row) -> LogRecord | None:
            time_us, record_id, tenant, level, service, pattern, trace_id, body = row
            record = LogRecord(tenant, record_id, time_us, level, service, pattern, trace_id, body)
            return record if _fits(record, wanted) else None

        found, resume = await page(self._session, selections, read, before, limit)
        return LogPage(found, resume)

    async def drop(self, before_us: int) -> None:
        """See ``LogStore.drop``: records live until their time is over."""

    async def _hours(
        self, way: _Way, wanted: LogFilter, before: Position | None
    ) -> list[int | None]:
        """The hours to look at, the newest first; None: the partition is not one of an hour."""
        if way.name == "trace":
            return [None]
        first = 0 if wanted.start_us is None else wanted.start_us // _HOUR_US
        last = _LAST_HOUR if wanted.end_us is None else wanted.end_us // _HOUR_US
        if before is not None:
            last = min(last, before.time_us // _HOUR_US)
        rows = await self._session.run(Statement(_HOURS, (way.name, _key(way), first, last)))
        return [hour for (hour,) in rows]


def _ways_of(record: LogRecord) -> list[_Way]:
    ways = [
        _Way("tenant_service", (record.tenant, record.service)),
        _Way("tenant", (record.tenant,)),
        _Way("service", (record.service,)),
        _Way("time", ()),
    ]
    return [_Way("trace", (record.trace_id,)), *ways] if record.trace_id else ways


def _way_to(wanted: LogFilter) -> _Way:
    """The table that serves a filter."""
    if wanted.trace_id:
        return _Way("trace", (wanted.trace_id,))
    if wanted.tenant is not None:
        if wanted.service:
            return _Way("tenant_service", (wanted.tenant, wanted.service))
        return _Way("tenant", (wanted.tenant,))
    return _Way("service", (wanted.service,)) if wanted.service else _Way("time", ())


def _key(way: _Way) -> str:
    """The values as one; a tenant has no blanks."""
    return " ".join(way.values)


def _selection(
    way: _Way, wanted: LogFilter, hour: int | None, limit: int, before: Position | None
) -> Statement:
    columns: list[str] = [column for column in _KEYS[way.name].split(", ") if column]
    conditions = [f"{column} = ?" for column in columns]
    values: list[Any] = list(way.values)
    if hour is not None:
        conditions.append("hour = ?")
        values.append(hour)
    if before is not None:
        conditions.append("(time_us, id) < (?, ?)")
        values += before
    elif wanted.end_us is not None:
        conditions.append("(time_us) < (?)")
        values.append(wanted.end_us)
    if wanted.start_us is not None:
        conditions.append("(time_us) >= (?)")
        values.append(wanted.start_us)
    return Statement(
        f"SELECT {_KEPT} FROM logs_by_{way.name} WHERE {' AND '.join(conditions)} LIMIT ?",
        (*values, limit),
    )


def _fits(record: LogRecord, wanted: LogFilter) -> bool:
    return (
        wanted.tenant in (None, record.tenant)
        and record.level >= wanted.level
        and wanted.service in ("", record.service)
        and wanted.pattern in ("", record.pattern)
        and wanted.trace_id in ("", record.trace_id)
        and (wanted.end_us is None or record.time_us < wanted.end_us)
    )


def _values(record: LogRecord) -> tuple[Any, ...]:
    """In the order of ``_KEPT``."""
    return (
        *(record.time_us, record.record_id, record.tenant, record.level),
        *(record.service, record.pattern, record.trace_id, record.body),
    )
