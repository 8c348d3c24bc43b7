"""Audit events on SQLite: one table of chains, with an index for each kind of list."""

from __future__ import annotations

import itertools
import sqlite3
import time
import uuid
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from agent360.mesh.metrics.audit.chain import day_of, link, successor
from agent360.mesh.metrics.ports import (
    Append,
    AuditEvent,
    ChainedEvent,
    ChainHead,
    ChainKey,
    ConflictError,
    EventFilter,
    EventPage,
    Position,
)
from agent360.mesh.metrics.stores.sqlite.database import Database
from agent360.mesh.metrics.stores.sqlite.migrations import script

MAX_ROWS_READ: Final = 5_000
"""Rows that one call reads at most while it looks for those that meet all conditions."""

_COLUMNS: Final = (
    "tenant, day, writer, sequence, previous, hash, id, time, actor, action, resource, body"
)
_AS_THEY_ARE: Final = (
    "tenant, day, writer, sequence, CAST(previous AS BLOB), CAST(hash AS BLOB), "
    "CAST(id AS BLOB), CAST(time AS INTEGER), CAST(actor AS BLOB), CAST(action AS BLOB), "
    "CAST(resource AS BLOB), CAST(body AS BLOB)"
)
"""The same, readable whatever somebody wrote there: it does not have the hash then."""
_CHAIN: Final = "tenant = ? AND day = ? AND writer = ?"


def _chain_what_there_was(db: sqlite3.Connection) -> None:
    """Takes over events that were recorded before there were chains: into a chain of today."""
    rows = db.execute(
        "SELECT tenant, id, time, actor, action, resource, body FROM events ORDER BY tenant, time"
    ).fetchall()
    today, writer = day_of(time.time()), uuid.uuid4().hex
    for tenant, group in itertools.groupby(map(AuditEvent._make, rows), lambda each: each.tenant):
        key = ChainKey(tenant, today, writer)
        events, head = link(successor(None, key), group)
        _insert(db, events, [head])
    db.execute("DROP TABLE events")


_MIGRATIONS: Final = (
    script("""
CREATE TABLE IF NOT EXISTS events (
    tenant TEXT NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL, actor TEXT NOT NULL,
    action TEXT NOT NULL, resource TEXT NOT NULL, body BLOB NOT NULL, PRIMARY KEY (tenant, id));
"""),
    script("""
CREATE TABLE audit_events (
    tenant TEXT NOT NULL, day INTEGER NOT NULL, writer TEXT NOT NULL, sequence INTEGER NOT NULL,
    previous BLOB NOT NULL, hash BLOB NOT NULL, id TEXT NOT NULL, time INTEGER NOT NULL,
    actor TEXT NOT NULL, action TEXT NOT NULL, resource TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (tenant, day, writer, sequence));
CREATE UNIQUE INDEX audit_by_id ON audit_events (tenant, id);
CREATE INDEX audit_by_time ON audit_events (tenant, time, id);
CREATE INDEX audit_by_actor ON audit_events (tenant, actor, time, id);
CREATE INDEX audit_by_action ON audit_events (tenant, action, time, id);
CREATE INDEX audit_by_resource ON audit_events (tenant, resource, time, id);
CREATE TABLE audit_heads (
    tenant TEXT NOT NULL, day INTEGER NOT NULL, writer TEXT NOT NULL, sequence INTEGER NOT NULL,
    hash BLOB NOT NULL, root BLOB NOT NULL, PRIMARY KEY (tenant, day, writer)) WITHOUT ROWID;
CREATE INDEX audit_heads_by_writer ON audit_heads (tenant, writer, day);
"""),
    _chain_what_there_was,
)


class Statement(NamedTuple):
    """A statement and its values."""

    sql: str
    values: tuple[Any, ...]


def list_statement(wanted: EventFilter, before: Position | None, limit: int) -> Statement:
    """Reads events by the index that fits the filter best; see ``EventStore.events``."""
    index, column, value = "audit_by_time", "", ""
    for column, value in (
        ("resource", wanted.resource),
        ("actor", wanted.actor),
        ("action", wanted.action),
    ):
        if value:
            index = f"audit_by_{column}"
            break
    conditions, values = ["tenant = ?"], [wanted.tenant]
    bounds: list[tuple[str, Any]] = [
        (f"{column} = ?", value or None),
        ("time >= ?", wanted.start_us),
        ("time < ?", wanted.end_us),
    ]
    for condition, bound in bounds:
        if bound is not None:
            conditions.append(condition)
            values.append(bound)
    if before is not None:
        conditions.append("(time, id) < (?, ?)")
        values += before  # type: ignore[arg-type]  # SQLite takes both
    sql = (
        f"SELECT {_COLUMNS} FROM audit_events INDEXED BY {index} "  # noqa: S608 - our own names
        f"WHERE {' AND '.join(conditions)} ORDER BY time DESC, id DESC LIMIT ?"
    )
    return Statement(sql, (*values, limit))


class SqliteEventStore:
    """The port ``EventStore``."""

    def __init__(self, database: Database) -> None:
        database.migrate("events", _MIGRATIONS)
        self._database = database

    async def known(self, events: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """See ``EventStore.known``."""
        sql = "SELECT 1 FROM audit_events WHERE tenant = ? AND id = ?"
        return await self._database.read(
            lambda db: {each for each in events if db.execute(sql, each).fetchone()}
        )

    async def heads(self, tenants: Sequence[str], writer: str) -> dict[str, ChainHead]:
        """See ``EventStore.heads``."""
        return await self._database.read(
            lambda db: {
                tenant: head
                for tenant in tenants
                if (head := _latest_head(db, tenant, writer)) is not None
            }
        )

    async def append(self, append: Append) -> None:
        """See ``EventStore.append``."""

        def write(db: sqlite3.Connection) -> bool:
            db.execute("SAVEPOINT append")
            try:
                _insert(db, append.events, append.heads)
            except sqlite3.IntegrityError:
                db.execute("ROLLBACK TO append")
                return False
            finally:
                db.execute("RELEASE append")
            return True

        if not await self._database.write(write):
            raise ConflictError("an event has the sequence or the id of another one")

    async def events(self, wanted: EventFilter, before: Position | None, limit: int) -> EventPage:
        """See ``EventStore.events``."""
        sql, values = list_statement(wanted, before, MAX_ROWS_READ + 1)

        def read(db: sqlite3.Connection) -> EventPage:
            found: list[ChainedEvent] = []
            last: ChainedEvent | None = None
            for count, each in enumerate(db.execute(sql, values)):
                if last is not None and (len(found) == limit or count == MAX_ROWS_READ):
                    return EventPage(found, Position(last.event.time_us, last.event.event_id))
                last = _chained(each)
                if _meets(wanted, last.event):
                    found.append(last)
            return EventPage(found, None)

        return await self._database.read(read)

    async def chains(
        self,
        tenant: str | None,
        first_day: int,
        last_day: int,
        after: ChainKey | None,
        limit: int,
    ) -> list[tuple[ChainKey, ChainHead | None]]:
        """See ``EventStore.chains``."""

        def read(db: sqlite3.Connection) -> list[tuple[ChainKey, ChainHead | None]]:
            found: list[tuple[ChainKey, ChainHead | None]] = []
            key = after
            while len(found) < limit:
                keys = [
                    _next_key(db, table, tenant, key) for table in ("audit_events", "audit_heads")
                ]
                key = min((each for each in keys if each is not None), default=None)
                if key is None:
                    break
                if first_day <= key.day <= last_day:
                    found.append((key, _head(db, key)))
                elif key.day > last_day:
                    key = ChainKey(key.tenant, _NO_DAY, "")
                else:
                    key = ChainKey(key.tenant, first_day - 1, _LAST_TEXT)
            return found

        return await self._database.read(read)

    async def chain(self, key: ChainKey, after: int, limit: int) -> list[ChainedEvent]:
        """See ``EventStore.chain``."""
        sql = (
            f"SELECT {_AS_THEY_ARE} FROM audit_events WHERE {_CHAIN} AND sequence > ? "  # noqa: S608
            "ORDER BY sequence LIMIT ?"
        )
        rows = await self._database.read(
            lambda db: db.execute(sql, (*key, after, limit)).fetchall()
        )
        return [_chained([*row[:6], *map(_readable, row[6:11]), row[11]]) for row in rows]

    async def drop_days(self, before: int) -> int:
        """See ``EventStore.drop_days``; each chain goes in a transaction of its own."""
        dropped = 0
        while True:
            chains = await self.chains(None, 0, before - 1, None, 1)
            if not chains:
                return dropped
            ((key, _),) = chains
            await self._database.write(lambda db, key=key: _drop(db, key))  # type: ignore[misc]
            dropped += 1


_NO_DAY: Final = 2**62
_LAST_TEXT: Final = "\U0010ffff"


def _insert(
    db: sqlite3.Connection, events: Sequence[ChainedEvent], heads: Sequence[ChainHead]
) -> None:
    db.executemany(
        f"INSERT INTO audit_events ({_COLUMNS}) "  # noqa: S608 - our own names
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *row.chain,
                row.sequence,
                row.previous,
                row.hash,
                row.event.event_id,
                row.event.time_us,
                row.event.actor,
                row.event.action,
                row.event.resource,
                row.event.body,
            )
            for row in events
        ],
    )
    db.executemany(
        "REPLACE INTO audit_heads (tenant, day, writer, sequence, hash, root) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        [(*head.chain, head.sequence, head.hash, head.root) for head in heads],
    )


def _latest_head(db: sqlite3.Connection, tenant: str, writer: str) -> ChainHead | None:
    """The latest head of a writer; beyond it where a row has a higher place, whoever wrote it."""
    sql = "SELECT day FROM audit_heads WHERE tenant = ? AND writer = ? ORDER BY day DESC LIMIT 1"
    found = db.execute(sql, (tenant, writer)).fetchone()
    if found is None:
        return None
    key = ChainKey(tenant, found[0], writer)
    head = _head(db, key)
    last = db.execute(
        f"SELECT sequence, hash FROM audit_events WHERE {_CHAIN} ORDER BY sequence DESC LIMIT 1",  # noqa: S608
        key,
    ).fetchone()
    if head is not None and last is not None and last[0] > head.sequence:
        return head._replace(sequence=last[0], hash=last[1])
    return head


def _head(db: sqlite3.Connection, key: ChainKey) -> ChainHead | None:
    sql = f"SELECT sequence, hash, root FROM audit_heads WHERE {_CHAIN}"  # noqa: S608
    row = db.execute(sql, key).fetchone()
    return None if row is None else ChainHead(key, *row)


def _next_key(
    db: sqlite3.Connection, table: str, tenant: str | None, after: ChainKey | None
) -> ChainKey | None:
    """The first chain after a key; a step along the primary key."""
    bound = after or ChainKey(tenant or "", -1, "")
    whose, values = ("", ()) if tenant is None else (" AND tenant = ?", (tenant,))
    row = db.execute(
        f"SELECT tenant, day, writer FROM {table} WHERE (tenant, day, writer) > (?, ?, ?){whose} "  # noqa: S608
        "ORDER BY tenant, day, writer LIMIT 1",
        (*bound, *values),
    ).fetchone()
    return None if row is None else ChainKey(*row)


def _drop(db: sqlite3.Connection, key: ChainKey) -> None:
    for table in ("audit_events", "audit_heads"):
        db.execute(f"DELETE FROM {table} WHERE {_CHAIN}", key)  # noqa: S608 - our own names


def _meets(wanted: EventFilter, event: AuditEvent) -> bool:
    return (
        wanted.resource in ("", event.resource)
        and wanted.actor in ("", event.actor)
        and wanted.action in ("", event.action)
    )


def _readable(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _chained(row: Sequence[Any]) -> ChainedEvent:
    tenant, day, writer, sequence, previous, own, event_id, time_us, *texts, body = row
    actor, action, resource = texts
    return ChainedEvent(
        ChainKey(tenant, day, writer),
        sequence,
        previous,
        own,
        AuditEvent(tenant, event_id, time_us, actor, action, resource, body),
    )
