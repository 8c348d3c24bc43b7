"""Which stores there are, by URL."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import structlog

from agent360.mesh.metrics.ports import Stores
from agent360.mesh.metrics.resolution import Retention
from agent360.mesh.metrics.stores.cassandra.settings import CassandraSettings
from agent360.mesh.metrics.stores.cassandra.url import SCHEME as CASSANDRA
from agent360.mesh.metrics.stores.cassandra.url import parse_cassandra_url
from agent360.mesh.metrics.stores.sqlite import open_sqlite

_SQLITE: Final = "sqlite:///"
_IN_MEMORY: Final = ":memory:"


def check_store_url(url: str) -> str:
    """The URL, if it names a supported store.

    Raises:
        ValueError: it does not; the message holds no password.
    """
    scheme = urlsplit(url).scheme
    if scheme == CASSANDRA:
        if find_spec("cassandra") is None:
            raise ValueError("a store cassandra:// needs the extra agent360-mesh[cassandra]")
        parse_cassandra_url(url)
    elif not url.startswith(_SQLITE) or url == _SQLITE:
        raise ValueError(
            f"a store {scheme}:// is not supported; supported: {_SQLITE}path, "
            f"{CASSANDRA}://host:port,host:port/keyspace"
        )
    return url


def journal_beside(url: str) -> Path | None:
    """Where the journal of a service on a store is by default; None: it goes with the process."""
    if urlsplit(url).scheme == CASSANDRA:
        return Path("var/metrics.journal")
    path = url.removeprefix(_SQLITE)
    return None if path == _IN_MEMORY else Path(f"{path}.journal")


async def open_stores(
    url: str,
    cassandra: CassandraSettings,
    retention: Retention,
    marks_s: float,
    log: structlog.stdlib.BoundLogger,
) -> Stores:
    """Opens the store of a URL, made or brought up to date if need be.

    Args:
        url: see ``check_store_url``.
        cassandra: of the connections, if it is one.
        retention: how long rollups are kept.
        marks_s: how long a mark is kept that does not move, in seconds.
        log: where a store that is away is noted.

    Raises:
        StoreError: it cannot be used.
    """
    if urlsplit(url).scheme != CASSANDRA:
        return await asyncio.to_thread(open_sqlite, url.removeprefix(_SQLITE))
    from agent360.mesh.metrics.stores.cassandra.lifetimes import Lifetimes  # noqa: PLC0415
    from agent360.mesh.metrics.stores.cassandra.opening import (  # noqa: PLC0415 - an extra
        open_cassandra,
    )

    lifetimes = Lifetimes(retention, marks_s, cassandra.late_compaction_s)
    return await open_cassandra(url, cassandra, lifetimes, log)
