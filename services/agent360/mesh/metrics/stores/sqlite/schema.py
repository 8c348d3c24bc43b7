"""The tables of series and rollups, and the way from the first form of them."""

from __future__ import annotations

import json
import sqlite3
from typing import Any, Final

import numpy as np

from agent360.mesh.metrics.bins import code_of_index
from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.resolution import FINE
from agent360.mesh.metrics.stores.blobs import blocks_of
from agent360.mesh.metrics.stores.sqlite.migrations import exists, script
from agent360.mesh.metrics.stores.sqlite.partitions import ensure

_tables: Final = script("""
CREATE TABLE series (
    id INTEGER PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, labels TEXT NOT NULL,
    kind INTEGER NOT NULL, unit TEXT NOT NULL, last_day INTEGER NOT NULL,
    UNIQUE (tenant, name, labels, kind, unit));
CREATE INDEX series_by_day ON series (last_day);
CREATE TABLE writers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, position INTEGER NOT NULL);
CREATE TABLE marks (name TEXT PRIMARY KEY, value BLOB NOT NULL, time REAL NOT NULL);
CREATE TABLE partitions (name TEXT PRIMARY KEY, resolution TEXT NOT NULL, start INTEGER NOT NULL);
CREATE TABLE open_blocks (
    block INTEGER PRIMARY KEY, writer INTEGER NOT NULL, origin INTEGER NOT NULL);
""")

_AT_ONCE: Final = 20_000
_DAY_S: Final = 86_400


def _first_version(db: sqlite3.Connection) -> None:
    """Makes the tables; keeps what the unversioned ones had, a row for each bucket of 10 s."""
    if not exists(db, "rollups"):
        _tables(db)
        return
    db.execute("ALTER TABLE series RENAME TO old_series")
    _tables(db)
    db.execute(
        "INSERT INTO series (id, tenant, name, labels, kind, unit, last_day) "
        "SELECT id, tenant, name, labels, kind, unit, coalesce("
        "(SELECT max(bucket) FROM rollups WHERE series = old_series.id), 0) / ? FROM old_series",
        (_DAY_S,),
    )
    rows = db.execute("SELECT * FROM rollups ORDER BY series, bucket")
    origin = 0
    while found := rows.fetchmany(_AT_ONCE):
        origin += 1
        for block in blocks_of(_frame(found), FINE.block_s):
            table = ensure(db, FINE, block.start_s)
            db.execute(
                f"INSERT INTO {table} VALUES (?, ?, 0, ?, ?, ?)",  # noqa: S608
                (block.start_s, block.series, origin, block.rows, block.bins),
            )
            db.execute("INSERT OR IGNORE INTO open_blocks VALUES (?, 0, 0)", (block.start_s,))
    for table in ("rollups", "old_series", "reporters"):
        db.execute(f"DROP TABLE IF EXISTS {table}")


def _frame(rows: list[Any]) -> Frame:
    """Rollups from the rows of the old table."""
    series, bucket, count, total, least, most, last, last_time, sketches = zip(*rows, strict=True)
    bins: list[tuple[int, int, int]] = []
    for row, sketch in enumerate(sketches):
        zeros, positive, negative = json.loads(sketch)
        bins += [(row, 0, zeros)] if zeros else []
        bins += [(row, code_of_index(int(index)), counted) for index, counted in positive]
        bins += [(row, -code_of_index(int(index)), counted) for index, counted in negative]
    numbers = np.array(bins, np.int64).reshape(-1, 3)
    columns: list[Any] = [np.array(column, np.int64) for column in (series, bucket, count)]
    columns += [np.array(column, float) for column in (total, least, most, last, last_time)]
    return Frame.merged((Frame((), *columns, *numbers.T),))


MIGRATIONS: Final = (_first_version,)
"""Of the subject ``rollups``."""
