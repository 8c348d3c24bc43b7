"""Stores of the metrics service, for tests that hold for each of them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog
from support.cassandra_server import CassandraServer

from agent360.mesh.metrics.ports import Stores
from agent360.mesh.metrics.settings import RetentionSettings
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.migrations import migrate
from agent360.mesh.metrics.stores.cassandra.opening import SUBJECTS, open_cassandra, stores_on
from agent360.mesh.metrics.stores.cassandra.schema import follow_settings
from agent360.mesh.metrics.stores.cassandra.session import Session, Statement
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.cassandra.url import parse_cassandra_url
from agent360.mesh.metrics.stores.sqlite import open_sqlite

S = TypeVar("S", bound=Session)

KINDS: Final = ("sqlite", "cassandra")
LIFETIMES: Final = Lifetimes(RetentionSettings().policy(), marks_s=86_400, late_s=3 * 86_400)

_SHARED: Final = "shared"
"""A keyspace that tests use one after the other; each leaves it empty."""


def new_keyspace() -> str:
    """A name that no keyspace has."""
    return f"test_{uuid.uuid4().hex[:12]}"


async def cassandra_stores(url: str, **settings: Any) -> Stores:
    """The store of a URL."""
    return await open_cassandra(url, CassandraSettings(**settings), LIFETIMES, _log())


@asynccontextmanager
async def session_of(
    cassandra: CassandraServer, keyspace: str, kind: type[S], **settings: Any
) -> AsyncIterator[S]:
    """A session of a keyspace, which has no tables if it is new."""
    target = parse_cassandra_url(cassandra.url(keyspace))
    session = kind(target, CassandraSettings(**settings), _log())
    try:
        await session.open()
        yield session
    finally:
        await session.close()


@asynccontextmanager
async def empty_tables(
    cassandra: CassandraServer, kind: type[S], **settings: Any
) -> AsyncIterator[S]:
    """A session of a keyspace whose tables are empty."""
    async with session_of(cassandra, _SHARED, kind, **settings) as session:
        await session.change_schema(f"ALTER KEYSPACE {_SHARED} WITH durable_writes = false")
        await migrate(session, SUBJECTS)
        await follow_settings(session, LIFETIMES)
        yield session
        await _empty(session)


@asynccontextmanager
async def opened(
    kind: str, directory: Path, cassandra: Callable[[], CassandraServer]
) -> AsyncIterator[Stores]:
    """An empty store of a kind, with the default retention."""
    if kind == "sqlite":
        stores = open_sqlite(str(directory / "metrics.db"))
        try:
            yield stores
        finally:
            await stores.close()
    else:
        async with empty_tables(cassandra(), Session) as session:
            yield stores_on(session, LIFETIMES)


async def _empty(session: Session) -> None:
    """Empties the tables that are not."""
    tables = [
        name
        for (name,) in await session.run(
            Statement(
                "SELECT table_name FROM system_schema.tables WHERE keyspace_name = ?", (_SHARED,)
            )
        )
        if name != "schema_versions"
    ]
    rows = await session.run_all([Statement(f"SELECT * FROM {name} LIMIT 1") for name in tables])
    await asyncio.gather(
        *(
            session.change_schema(f"TRUNCATE {name}")
            for name, found in zip(tables, rows, strict=True)
            if found
        )
    )


def _log() -> structlog.stdlib.BoundLogger:
    log: structlog.stdlib.BoundLogger = structlog.get_logger()
    return log
