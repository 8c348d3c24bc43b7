"""Audit events on Cassandra: a table of chains, and a table for each way of looking for them.

Each event is written whole into every one of them: there are no joins and no indexes. Partitions
are a day of a tenant (and of an actor, action or resource); which days there are says a table of
their own. An append is many writes, the heads of the chains first and the events that can be listed
last; a repetition overwrites.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from agent360.mesh.metrics.ports import (
    Append,
    AuditEvent,
    ChainedEvent,
    ChainHead,
    ChainKey,
    EventFilter,
    EventPage,
    Position,
)
from agent360.mesh.metrics.stores.cassandra.lifetimes import ttl_until
from agent360.mesh.metrics.stores.cassandra.listing import page
from agent360.mesh.metrics.stores.cassandra.registry import shard_of
from agent360.mesh.metrics.stores.cassandra.schema import SHARDS
from agent360.mesh.metrics.stores.cassandra.session import Batch, Row, Session, Statement

_DAY_US: Final = 86_400_000_000
_LAST_DAY: Final = 1 << 40
_FIELDS: Final = ("resource", "actor", "action")
"""What can be looked for, the most selective first."""
_KEPT: Final = "time_us, id, actor, action, resource, body, writer, day, sequence, previous, hash"
_TYPES: Final = """time_us bigint, id text, actor text, action text, resource text, body blob,
    writer text, day bigint, sequence bigint, previous blob, hash blob"""
_TABLES: Final = {"": "events_by_time", **{field: f"events_by_{field}" for field in _FIELDS}}

MIGRATIONS: Final = (
    (
        f"""CREATE TABLE IF NOT EXISTS chains (
        tenant text, {_TYPES}, PRIMARY KEY ((tenant, day, writer), sequence))""",
        """CREATE TABLE IF NOT EXISTS chain_heads (
        tenant text, writer text, day bigint, sequence bigint, hash blob, root blob,
        PRIMARY KEY ((tenant, writer), day)) WITH CLUSTERING ORDER BY (day DESC)""",
        """CREATE TABLE IF NOT EXISTS chain_days (
        tenant text, day bigint, writer text, PRIMARY KEY ((tenant), day, writer))""",
        """CREATE TABLE IF NOT EXISTS event_tenants (
        shard int, tenant text, PRIMARY KEY ((shard), tenant))""",
        """CREATE TABLE IF NOT EXISTS event_ids (
        tenant text, id text, PRIMARY KEY ((tenant, id)))""",
        """CREATE TABLE IF NOT EXISTS event_days (
        tenant text, field text, value text, listed_day bigint,
        PRIMARY KEY ((tenant, field, value), listed_day))
        WITH CLUSTERING ORDER BY (listed_day DESC)""",
        *(
            f"""CREATE TABLE IF NOT EXISTS {table} (
            tenant text, listed_day bigint, {_TYPES},
            PRIMARY KEY ((tenant, {f"{field}, " if field else ""}listed_day), time_us, id))
            WITH CLUSTERING ORDER BY (time_us DESC, id DESC)"""
            for field, table in _TABLES.items()
        ),
    ),
)
"""Of the subject ``events``."""

_MARKS: Final = ", ".join(["?"] * 11)
_TTL: Final = " USING TTL ?"
_WRITE_CHAINED: Final = f"INSERT INTO chains (tenant, {_KEPT}) VALUES (?, {_MARKS})" + _TTL
_WRITE_HEAD: Final = (
    "INSERT INTO chain_heads (tenant, writer, day, sequence, hash, root) VALUES (?, ?, ?, ?, ?, ?)"
    + _TTL
)
_WRITE_CHAIN: Final = "INSERT INTO chain_days (tenant, day, writer) VALUES (?, ?, ?)" + _TTL
_WRITE_TENANT: Final = "INSERT INTO event_tenants (shard, tenant) VALUES (?, ?)" + _TTL
_WRITE_ID: Final = "INSERT INTO event_ids (tenant, id) VALUES (?, ?)" + _TTL
_WRITE_DAY: Final = (
    "INSERT INTO event_days (tenant, field, value, listed_day) VALUES (?, ?, ?, ?)" + _TTL
)
_WRITE_LISTED: Final = {
    field: f"INSERT INTO {table} (tenant, listed_day, {_KEPT}) VALUES (?, ?, {_MARKS})" + _TTL
    for field, table in _TABLES.items()
}
_KNOWN: Final = "SELECT tenant, id FROM event_ids WHERE tenant = ? AND id = ?"
_HEAD: Final = "SELECT day, sequence, hash, root FROM chain_heads WHERE tenant = ? AND writer = ?"
_LATEST: Final = _HEAD + " LIMIT 1"
_HEAD_OF: Final = _HEAD + " AND day = ?"
_TENANTS: Final = "SELECT tenant FROM event_tenants WHERE shard = ?"
_CHAINS: Final = "SELECT day, writer FROM chain_days WHERE tenant = ?"
_FROM_DAY: Final = _CHAINS + " AND day >= ? AND day <= ? LIMIT ?"
_AFTER: Final = _CHAINS + " AND (day, writer) > (?, ?) AND day <= ? LIMIT ?"
_CHAIN: Final = (
    f"SELECT {_KEPT} FROM chains "
    "WHERE tenant = ? AND day = ? AND writer = ? AND sequence > ? LIMIT ?"
)
_DAYS: Final = (
    "SELECT listed_day FROM event_days WHERE tenant = ? AND field = ? AND value = ? "
    "AND listed_day >= ? AND listed_day <= ?"
)


class _Way(NamedTuple):
    """A table of lists, and the value that its partitions are of."""

    field: str
    """Empty: by time alone."""
    value: str


class CassandraEventStore:
    """The port ``EventStore``."""

    def __init__(self, session: Session) -> None:
        """Uses the tables of ``MIGRATIONS``."""
        self._session = session

    async def known(self, events: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """See ``EventStore.known``."""
        answers = await self._session.run_all([Statement(_KNOWN, event) for event in events])
        return {(row[0], row[1]) for rows in answers for row in rows}

    async def heads(self, tenants: Sequence[str], writer: str) -> dict[str, ChainHead]:
        """See ``EventStore.heads``."""
        answers = await self._session.run_all(
            [Statement(_LATEST, (tenant, writer)) for tenant in tenants]
        )
        return {
            tenant: _head(tenant, writer, rows[0])
            for tenant, rows in zip(tenants, answers, strict=True)
            if rows
        }

    async def append(self, append: Append) -> None:
        """See ``EventStore.append``.

        Heads are written first: so no row is ever ahead of the head of its chain. What tells that
        an event is recorded is written last.
        """
        ttl = ttl_until(append.keep_until_s)
        tenants = {head.chain.tenant for head in append.heads}
        names: list[Statement | Batch] = [
            Statement(_WRITE_TENANT, (shard_of(tenant), tenant, ttl)) for tenant in tenants
        ]
        names += [Statement(_WRITE_CHAIN, (*head.chain, ttl)) for head in append.heads]
        await self._session.run_all(names)
        await self._session.run_all(
            [
                Statement(
                    _WRITE_HEAD,
                    (
                        *(head.chain.tenant, head.chain.writer, head.chain.day),
                        *(head.sequence, head.hash, head.root, ttl),
                    ),
                )
                for head in append.heads
            ]
        )
        days: dict[tuple[Any, ...], None] = {}
        rows: list[Statement | Batch] = []
        for chained in append.events:
            event, kept = chained.event, _values(chained)
            rows.append(Statement(_WRITE_CHAINED, (event.tenant, *kept, ttl)))
            listed_day = event.time_us // _DAY_US
            for way in (_Way("", ""), *(_Way(field, getattr(event, field)) for field in _FIELDS)):
                days[event.tenant, *way, listed_day, ttl] = None
                rows.append(
                    Statement(_WRITE_LISTED[way.field], (event.tenant, listed_day, *kept, ttl))
                )
        await self._session.run_all([Statement(_WRITE_DAY, day) for day in days])
        await self._session.run_all(rows)
        await self._session.run_all(
            [
                Statement(_WRITE_ID, (each.event.tenant, each.event.event_id, ttl))
                for each in append.events
            ]
        )

    async def events(self, wanted: EventFilter, before: Position | None, limit: int) -> EventPage:
        """See ``EventStore.events``."""
        way = _way_of(wanted)
        first = 0 if wanted.start_us is None else wanted.start_us // _DAY_US
        last = _LAST_DAY if wanted.end_us is None else wanted.end_us // _DAY_US
        if before is not None:
            last = min(last, before.time_us // _DAY_US)
        days = await self._session.run(Statement(_DAYS, (wanted.tenant, *way, first, last)))

        def read(row: Row) -> ChainedEvent | None:
            chained = _chained(wanted.tenant, row)
            return chained if _fits(chained.event, wanted) else None

        selections = [partial(_selection, way, wanted, day, limit) for (day,) in days]
        found, resume = await page(self._session, selections, read, before, limit)
        return EventPage(found, resume)

    async def chains(
        self,
        tenant: str | None,
        first_day: int,
        last_day: int,
        after: ChainKey | None,
        limit: int,
    ) -> list[tuple[ChainKey, ChainHead | None]]:
        """See ``EventStore.chains``."""
        tenants = [tenant] if tenant is not None else await self._tenants()
        keys: list[ChainKey] = []
        for each in tenants:
            if after is not None and each < after.tenant:
                continue
            room = limit - len(keys)
            if after is not None and each == after.tenant and after.day >= first_day:
                values: tuple[Any, ...] = (each, after.day, after.writer, last_day, room)
                rows = await self._session.run(Statement(_AFTER, values))
            else:
                values = (each, first_day, last_day, room)
                rows = await self._session.run(Statement(_FROM_DAY, values))
            keys += [ChainKey(each, day, writer) for day, writer in rows]
            if len(keys) >= limit:
                break
        answers = await self._session.run_all(
            [Statement(_HEAD_OF, (key.tenant, key.writer, key.day)) for key in keys]
        )
        return [
            (key, _head(key.tenant, key.writer, rows[0]) if rows else None)
            for key, rows in zip(keys, answers, strict=True)
        ]

    async def chain(self, key: ChainKey, after: int, limit: int) -> list[ChainedEvent]:
        """See ``EventStore.chain``."""
        rows = await self._session.run(Statement(_CHAIN, (*key, after, limit)))
        return [_chained(key.tenant, row) for row in rows]

    async def drop_days(self, before: int) -> int:  # noqa: ARG002 - rows expire by themselves
        """See ``EventStore.drop_days``: rows live until ``Append.keep_until_s``."""
        return 0

    async def _tenants(self) -> list[str]:
        answers = await self._session.run_all(
            [Statement(_TENANTS, (shard,)) for shard in range(SHARDS)]
        )
        return sorted(row[0] for rows in answers for row in rows)


def _way_of(wanted: EventFilter) -> _Way:
    for field in _FIELDS:
        value: str = getattr(wanted, field)
        if value:
            return _Way(field, value)
    return _Way("", "")


def _selection(
    way: _Way, wanted: EventFilter, day: int, limit: int, before: Position | None
) -> Statement:
    conditions = ["tenant = ?", "listed_day = ?"]
    values: list[object] = [wanted.tenant, day]
    if way.field:
        conditions.append(f"{way.field} = ?")
        values.append(way.value)
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
        f"SELECT {_KEPT} FROM {_TABLES[way.field]} WHERE " + " AND ".join(conditions) + " LIMIT ?",
        (*values, limit),
    )


def _fits(event: AuditEvent, wanted: EventFilter) -> bool:
    return all(getattr(wanted, field) in ("", getattr(event, field)) for field in _FIELDS) and (
        wanted.end_us is None or event.time_us < wanted.end_us
    )


def _values(chained: ChainedEvent) -> tuple[Any, ...]:
    """In the order of ``_KEPT``."""
    event, chain = chained.event, chained.chain
    return (
        *(event.time_us, event.event_id, event.actor, event.action, event.resource, event.body),
        *(chain.writer, chain.day, chained.sequence, chained.previous, chained.hash),
    )


def _chained(tenant: str, row: Row) -> ChainedEvent:
    time_us, event_id, actor, action, resource, body, writer, day, sequence, previous, digest = row
    return ChainedEvent(
        ChainKey(tenant, day, writer),
        sequence,
        previous,
        digest,
        AuditEvent(tenant, event_id, time_us, actor, action, resource, body),
    )


def _head(tenant: str, writer: str, row: Row) -> ChainHead:
    day, sequence, digest, root = row
    return ChainHead(ChainKey(tenant, day, writer), sequence, digest, root)
