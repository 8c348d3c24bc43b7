"""Reads rollups from the tables of SQLite."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.resolution import FINE, Resolution
from agent360.mesh.metrics.series import SeriesId
from agent360.mesh.metrics.stores.blobs import frame_of
from agent360.mesh.metrics.stores.sqlite.partitions import within


class Wanted(NamedTuple):
    """Which rollups; see ``RollupStore.read``."""

    series: Sequence[SeriesId]
    places: Mapping[int, int]
    """Their places in ``series`` by their numbers in the tables."""
    start_s: float
    end_s: float
    writer: int
    before: int
    bins: bool


def read_frame(db: sqlite3.Connection, wanted: Wanted, resolution: Resolution) -> Frame:
    """The rollups: of hours that were not computed in the resolution yet, the finest."""
    if not wanted.places:
        return Frame.empty(wanted.series)
    if resolution is FINE:
        hours = _blocks(wanted, FINE)
        return _read(db, wanted, FINE, hours)
    open_hours = [
        row[0]
        for row in db.execute(
            "SELECT block FROM open_blocks WHERE block > ? AND block < ?",
            (wanted.start_s - FINE.block_s, wanted.end_s),
        )
    ]
    coarse = _read(db, wanted, resolution, _blocks(wanted, resolution))
    is_open = np.isin(coarse.bucket_s // FINE.block_s * FINE.block_s, open_hours)
    return Frame.joined((coarse.chosen(~is_open), _read(db, wanted, FINE, open_hours)))


def _blocks(wanted: Wanted, resolution: Resolution) -> list[int]:
    length = resolution.block_s
    return list(range(int(wanted.start_s // length) * length, int(-(-wanted.end_s // 1)), length))


def _read(
    db: sqlite3.Connection, wanted: Wanted, resolution: Resolution, blocks: Sequence[int]
) -> Frame:
    numbers = json.dumps(list(wanted.places))
    found: list[tuple[int, bytes, bytes | None]] = []
    bins = "bins" if wanted.bins else "NULL"
    for partition in within(db, resolution, wanted.start_s - resolution.block_s, wanted.end_s):
        end_s = partition.start_s + resolution.partition_s
        here = json.dumps([block for block in blocks if partition.start_s <= block < end_s])
        statement = (
            f"SELECT series, rows, {bins} FROM {partition.table} "  # noqa: S608
            "WHERE block IN (SELECT value FROM json_each(?1)) "
            "AND series IN (SELECT value FROM json_each(?2))"
        )
        if resolution is FINE:
            statement += " AND NOT (writer = ?3 AND origin >= ?4)"
            rows = db.execute(statement, (here, numbers, wanted.writer, wanted.before))
        else:
            rows = db.execute(statement, (here, numbers))
        found += [(wanted.places[number], data, blob) for number, data, blob in rows]
    return frame_of(wanted.series, found).within(wanted.start_s, wanted.end_s)
