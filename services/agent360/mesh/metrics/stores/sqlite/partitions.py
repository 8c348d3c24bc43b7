"""Tables of rollups, one for each resolution and partition of time."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import NamedTuple

from agent360.mesh.metrics.resolution import FINE, RESOLUTIONS, Resolution, Retention


class Partition(NamedTuple):
    """One table of rollups."""

    table: str
    resolution: Resolution
    start_s: int


def ensure(db: sqlite3.Connection, resolution: Resolution, time_s: int) -> str:
    """The table for a time, made if need be.

    Rows of the finest resolution say which commit they came with: writer and origin, both 0 once
    all rows of the block were put together.
    """
    start_s = time_s // resolution.partition_s * resolution.partition_s
    name = f"rollups_{resolution.name}_{datetime.fromtimestamp(start_s, UTC):%Y%m%d}"
    commit = "writer INTEGER NOT NULL, origin INTEGER NOT NULL, " if resolution is FINE else ""
    key = "block, series, writer, origin" if resolution is FINE else "block, series"
    db.execute(
        f"CREATE TABLE IF NOT EXISTS {name} (block INTEGER NOT NULL, series INTEGER NOT NULL, "
        f"{commit}rows BLOB NOT NULL, bins BLOB NOT NULL, PRIMARY KEY ({key})) WITHOUT ROWID"
    )
    db.execute(
        "INSERT OR IGNORE INTO partitions (name, resolution, start) VALUES (?, ?, ?)",
        (name, resolution.name, start_s),
    )
    return name


def within(
    db: sqlite3.Connection, resolution: Resolution, start_s: float, end_s: float
) -> list[Partition]:
    """The tables that have something of a range of time, the oldest first."""
    rows = db.execute(
        "SELECT name, start FROM partitions WHERE resolution = ? AND start > ? AND start < ? "
        "ORDER BY start",
        (resolution.name, start_s - resolution.partition_s, end_s),
    )
    return [Partition(name, resolution, start) for name, start in rows.fetchall()]


def drop_expired(db: sqlite3.Connection, now_s: float, retention: Retention) -> None:
    """Drops the tables whose last bucket is past its retention.

    One with hours that are still to be computed in coarser resolutions stays until they are.
    """
    for resolution in RESOLUTIONS:
        before_s = now_s - retention.of(resolution)
        for partition in within(db, resolution, 0, before_s):
            end_s = partition.start_s + resolution.partition_s
            if end_s > before_s or (resolution is FINE and _has_open(db, partition)):
                continue
            db.execute(f"DROP TABLE {partition.table}")
            db.execute("DELETE FROM partitions WHERE name = ?", (partition.table,))


def _has_open(db: sqlite3.Connection, partition: Partition) -> bool:
    found = db.execute(
        "SELECT 1 FROM open_blocks WHERE block >= ? AND block < ?",
        (partition.start_s, partition.start_s + FINE.partition_s),
    )
    return found.fetchone() is not None
