"""Makes the ports of a keyspace."""

from __future__ import annotations

from typing import Final

import structlog

from agent360.mesh.metrics.ports import Stores
from agent360.mesh.metrics.stores.cassandra import events, logs, rules, schema
from agent360.mesh.metrics.stores.cassandra.events import CassandraEventStore
from agent360.mesh.metrics.stores.cassandra.exposition import CassandraCollector
from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes
from agent360.mesh.metrics.stores.cassandra.logs import CassandraLogStore
from agent360.mesh.metrics.stores.cassandra.migrations import migrate
from agent360.mesh.metrics.stores.cassandra.rollups import CassandraRollupStore
from agent360.mesh.metrics.stores.cassandra.rules import CassandraRuleStore
from agent360.mesh.metrics.stores.cassandra.session import Session
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.cassandra.url import parse_cassandra_url

SUBJECTS: Final = {
    "rollups": schema.MIGRATIONS,
    "events": events.MIGRATIONS,
    "logs": logs.MIGRATIONS,
    "rules": rules.MIGRATIONS,
}
"""The migrations of all tables, by subject."""


async def open_cassandra(
    url: str,
    settings: CassandraSettings,
    lifetimes: Lifetimes,
    log: structlog.stdlib.BoundLogger,
) -> Stores:
    """Opens the store of a URL, made or brought up to date if need be.

    Waits, and says so in the log, as long as no node can be reached.

    Raises:
        ValueError: the URL names no keyspace.
        StoreError: the store cannot be used, or is of a later version.
    """
    session = Session(parse_cassandra_url(url), settings, log)
    try:
        await session.open()
        await migrate(session, SUBJECTS)
        await schema.follow_settings(session, lifetimes)
    except BaseException:
        await session.close()
        raise
    return stores_on(session, lifetimes)


def stores_on(session: Session, lifetimes: Lifetimes) -> Stores:
    """The ports on a session whose keyspace has the tables."""
    return Stores(
        CassandraRollupStore(session, lifetimes),
        CassandraEventStore(session),
        CassandraLogStore(session),
        CassandraRuleStore(session),
        session.close,
        (CassandraCollector(session),),
    )
