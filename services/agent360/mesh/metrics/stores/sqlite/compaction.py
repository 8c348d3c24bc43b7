"""Computes rollups of minutes and hours from those of 10 s, once an hour is over.

Which hours have something that the coarser resolutions lack is in the table ``open_blocks``: a
commit enters the hours it touches in its own transaction, and an hour is taken out when all of its
series were computed and no commit has touched it meanwhile. As long as it is in there, reads take
the finest rollups. So a crash at any point only makes the work be done again, with the same result.
"""

from __future__ import annotations

import sqlite3
from typing import Final, NamedTuple

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.resolution import FINE, HOUR, MINUTE
from agent360.mesh.metrics.stores.blobs import blocks_of, frame_of
from agent360.mesh.metrics.stores.sqlite.partitions import ensure

GRACE_S: Final = 300
"""How long after its end an hour waits for what comes late, before it is computed."""

_SERIES_AT_ONCE: Final = 200


class OpenHour(NamedTuple):
    """A row of ``open_blocks``: the start of an hour, and the commit that touched it last."""

    start_s: int
    writer: int
    origin: int


def hours_to_compact(
    db: sqlite3.Connection, now_s: float, writer: int, settled: int
) -> list[OpenHour]:
    """The hours that are over and whose commits are settled; see ``RollupStore.compact``."""
    rows = db.execute(
        "SELECT block, writer, origin FROM open_blocks "
        "WHERE block <= ? AND NOT (writer = ? AND origin >= ?) ORDER BY block",
        (now_s - FINE.block_s - GRACE_S, writer, settled),
    )
    return [OpenHour(*row) for row in rows]


class HourCompaction:
    """Computes one hour, some series at a time, each in a transaction."""

    def __init__(self, hour: OpenHour) -> None:
        self._hour = hour
        self._last = -1

    def next_slice(self, db: sqlite3.Connection) -> bool:
        """Computes the next series; False: there are no more."""
        hour = self._hour.start_s
        fine = ensure(db, FINE, hour)
        found = db.execute(
            f"SELECT DISTINCT series FROM {fine} WHERE block = ? AND series > ? "  # noqa: S608
            "ORDER BY series LIMIT ?",
            (hour, self._last, _SERIES_AT_ONCE),
        ).fetchall()
        if not found:
            return False
        first, last = found[0][0], found[-1][0]
        key = (hour, first, last)
        rows = db.execute(
            f"SELECT series, rows, bins FROM {fine} "  # noqa: S608
            "WHERE block = ? AND series BETWEEN ? AND ? ORDER BY series, writer, origin",
            key,
        ).fetchall()
        whole = Frame.merged((frame_of((), rows),))
        db.execute(f"DELETE FROM {fine} WHERE block = ? AND series BETWEEN ? AND ?", key)  # noqa: S608
        db.executemany(
            f"INSERT INTO {fine} VALUES (?, ?, 0, 0, ?, ?)",  # noqa: S608
            [
                (block.start_s, block.series, block.rows, block.bins)
                for block in blocks_of(whole, FINE.block_s)
            ],
        )
        _replace(db, ensure(db, MINUTE, hour), whole.coarser(MINUTE.length_s), MINUTE.block_s)
        self._add_to_day(db, whole.coarser(HOUR.length_s), first, last)
        self._last = last
        return True

    def finish(self, db: sqlite3.Connection) -> None:
        """Notes that the hour is computed, unless it was touched meanwhile."""
        db.execute(
            "DELETE FROM open_blocks WHERE block = ? AND writer = ? AND origin = ?", self._hour
        )

    def _add_to_day(self, db: sqlite3.Connection, hours: Frame, first: int, last: int) -> None:
        table = ensure(db, HOUR, self._hour.start_s)
        day = self._hour.start_s // HOUR.block_s * HOUR.block_s
        rows = db.execute(
            f"SELECT series, rows, bins FROM {table} "  # noqa: S608
            "WHERE block = ? AND series BETWEEN ? AND ?",
            (day, first, last),
        ).fetchall()
        known = frame_of((), rows)
        others = known.chosen(known.bucket_s != self._hour.start_s)
        _replace(db, table, Frame.merged((others, hours)), HOUR.block_s)


def _replace(db: sqlite3.Connection, table: str, frame: Frame, block_s: int) -> None:
    db.executemany(
        f"REPLACE INTO {table} VALUES (?, ?, ?, ?)",  # noqa: S608
        [
            (block.start_s, block.series, block.rows, block.bins)
            for block in blocks_of(frame, block_s)
        ],
    )
