"""The tables of series and rollups, and what of them follows the settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from agent360.mesh.metrics.stores.cassandra.lifetimes import LAYOUTS, Layout, Lifetimes
from agent360.mesh.metrics.stores.cassandra.session import Session, Statement

SHARDS: Final = 16
"""Into so many partitions is divided what would else be one of a tenant or writer."""

_ROLLUPS: Final = (
    # Rows of the finest say which commit they came with.
    """CREATE TABLE IF NOT EXISTS rollups_10s (
    tenant text, series blob, block_s bigint, time_s bigint, writer text, origin bigint,
    rows blob, bins blob, PRIMARY KEY ((tenant, series, block_s), time_s, writer, origin))
    WITH CLUSTERING ORDER BY (time_s DESC, writer ASC, origin ASC)
    AND compaction = {'class': 'TimeWindowCompactionStrategy'}""",
    """CREATE TABLE IF NOT EXISTS rollups_1m (
    tenant text, series blob, block_s bigint, time_s bigint, rows blob, bins blob,
    PRIMARY KEY ((tenant, series, block_s), time_s)) WITH CLUSTERING ORDER BY (time_s DESC)
    AND compaction = {'class': 'TimeWindowCompactionStrategy'}""",
    """CREATE TABLE IF NOT EXISTS rollups_1h (
    tenant text, series blob, block_s bigint, time_s bigint, rows blob, bins blob,
    PRIMARY KEY ((tenant, series, block_s), time_s)) WITH CLUSTERING ORDER BY (time_s DESC)
    AND compaction = {'class': 'TimeWindowCompactionStrategy'}""",
    """CREATE TABLE IF NOT EXISTS tenants (
    shard int, tenant text, last_day bigint, PRIMARY KEY ((shard), tenant))""",
    """CREATE TABLE IF NOT EXISTS series (
    tenant text, shard int, name text, id blob, labels text, kind int, unit text, last_day bigint,
    PRIMARY KEY ((tenant, shard), name, id))""",
    """CREATE TABLE IF NOT EXISTS writers (
    writer text PRIMARY KEY, position bigint, settled bigint, seen_s bigint)""",
    """CREATE TABLE IF NOT EXISTS marks (
    writer text, shard int, name text, value blob, time_s double,
    PRIMARY KEY ((writer, shard), name))""",
    # Which hours have something that the coarser resolutions lack: see ``hours``.
    "CREATE TABLE IF NOT EXISTS days (one int, day bigint, PRIMARY KEY ((one), day))",
    """CREATE TABLE IF NOT EXISTS hours (
    day bigint, hour_s bigint, writer text, origin bigint, stamp bigint, computed bigint,
    PRIMARY KEY ((day), hour_s, writer))""",
)

MIGRATIONS: Final = (_ROLLUPS,)
"""Of the subject ``rollups``."""


async def follow_settings(session: Session, lifetimes: Lifetimes) -> None:
    """Sets the lifetimes and windows of the rollup tables, where they differ.

    What is written already keeps its lifetime.

    Raises:
        StoreError: it failed; it is to be repeated.
    """
    rows = await session.run(
        Statement(
            "SELECT table_name, default_time_to_live, compaction FROM system_schema.tables "
            "WHERE keyspace_name = ?",
            (session.target.keyspace,),
        )
    )
    present = {name: (ttl, dict(compaction)) for name, ttl, compaction in rows}
    for layout in LAYOUTS.values():
        ttl, compaction = present[layout.table]
        if _differs(layout, lifetimes, ttl, compaction):
            window = lifetimes.window(layout.resolution)
            await session.change_schema(
                f"ALTER TABLE {layout.table} WITH default_time_to_live = "
                f"{lifetimes.default_s(layout.resolution)} AND compaction = "
                "{'class': 'TimeWindowCompactionStrategy', "
                f"'compaction_window_unit': '{window.unit}', "
                f"'compaction_window_size': '{window.size}'}}"
            )


def _differs(layout: Layout, lifetimes: Lifetimes, ttl: int, compaction: Mapping[str, Any]) -> bool:
    window = lifetimes.window(layout.resolution)
    present = compaction.get("compaction_window_size"), compaction.get("compaction_window_unit")
    return ttl != lifetimes.default_s(layout.resolution) or present != (
        str(window.size),
        window.unit,
    )
