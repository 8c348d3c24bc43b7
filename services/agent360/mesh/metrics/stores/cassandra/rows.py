"""Rollups as rows: which statements write and read them.

A row holds the rollups of one series in a stretch of time. Its timestamp is its time plus what
makes it newer than an earlier one of the same key: so files of a window of time hold data of that
time, however late it was written, and are dropped together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Final, NamedTuple

from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.ports import Commit
from agent360.mesh.metrics.resolution import FINE, Resolution
from agent360.mesh.metrics.stores.blobs import blocks_of
from agent360.mesh.metrics.stores.cassandra.lifetimes import LAYOUTS, Lifetimes
from agent360.mesh.metrics.stores.cassandra.session import Batch, Statement

MOST_BATCH_BYTES: Final = 32 << 10
"""Rows of a partition that are written as one."""

_MICROSECONDS: Final = 1_000_000
_WRITE_FINE: Final = (
    "INSERT INTO rollups_10s (tenant, series, block_s, time_s, writer, origin, rows, bins) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?"
)
_WRITE_COARSE: Final = {
    each.table: f"INSERT INTO {each.table} (tenant, series, block_s, time_s, rows, bins) "
    "VALUES (?, ?, ?, ?, ?, ?) USING TIMESTAMP ? AND TTL ?"
    for layout, each in LAYOUTS.items()
    if layout is not FINE
}
_RANGE: Final = " WHERE tenant = ? AND series = ? AND block_s = ? AND time_s >= ? AND time_s < ?"
_READ: Final = {
    (layout, bins): f"SELECT rows{', bins' if bins else ''}"
    f"{', writer, origin' if layout is FINE else ''} FROM {each.table}" + _RANGE
    for layout, each in LAYOUTS.items()
    for bins in (True, False)
}


class Span(NamedTuple):
    """A range of time, Unix time, its end not included."""

    start_s: float
    end_s: float


class Wanted(NamedTuple):
    """A series whose rollups are read, and what its number is to be in the frame."""

    tenant: str
    key: bytes
    place: int


def fine_writes(
    commit: Commit, keys: Mapping[int, bytes], lifetimes: Lifetimes
) -> list[Statement | Batch]:
    """The writes of a commit's rows.

    Args:
        commit: whose.
        keys: of the series of its frame, by place.
        lifetimes: of the rows.
    """
    layout = LAYOUTS[FINE]
    newer_us = commit.position - commit.origin
    writes: list[Statement | Batch] = []
    blocks = blocks_of(commit.frame, layout.row_s)
    for (number, block_s), group in groupby(
        blocks, key=lambda each: (each.series, each.start_s // layout.partition_s)
    ):
        key = (commit.frame.series[number].tenant, keys[number], block_s * layout.partition_s)
        writes += _batched(
            Statement(
                _WRITE_FINE,
                (
                    *key,
                    *(block.start_s, commit.writer, commit.origin, block.rows, block.bins),
                    block.start_s * _MICROSECONDS + newer_us,
                    lifetimes.of_rollups(FINE, block.start_s),
                ),
            )
            for block in group
        )
    return writes


def coarse_writes(
    frame: Frame,
    keys: Sequence[tuple[str, bytes]],
    resolution: Resolution,
    version: int,
    lifetimes: Lifetimes,
) -> list[Statement | Batch]:
    """The writes of coarser rollups.

    Args:
        frame: the rollups, in buckets of the resolution.
        keys: tenant and key of its series, by place.
        resolution: of the buckets.
        version: of the rows; grows when they are computed from more.
        lifetimes: of the rows.
    """
    layout = LAYOUTS[resolution]
    return [
        Statement(
            _WRITE_COARSE[layout.table],
            (
                *keys[block.series],
                *(block.start_s // layout.partition_s * layout.partition_s, block.start_s),
                *(block.rows, block.bins),
                block.start_s * _MICROSECONDS + version,
                lifetimes.of_rollups(resolution, block.start_s),
            ),
        )
        for block in blocks_of(frame, layout.row_s)
    ]


def reads(
    wanted: Wanted, resolution: Resolution, span: Span, *, bins: bool = True
) -> list[Statement]:
    """The statements that read a range of a series, one for each partition.

    Rows come first in what they return, then bins if they are wanted; of the finest, writer and
    origin follow.
    """
    layout = LAYOUTS[resolution]
    first = int(span.start_s // layout.partition_s) * layout.partition_s
    start_s = int(span.start_s // layout.row_s) * layout.row_s
    return [
        Statement(
            _READ[resolution, bins],
            (wanted.tenant, wanted.key, block_s, start_s, int(-(-span.end_s // 1))),
        )
        for block_s in range(first, int(-(-span.end_s // 1)), layout.partition_s)
    ]


def _batched(statements: Iterable[Statement]) -> list[Statement | Batch]:
    """Statements to one partition, put together as far as they are not too large."""
    groups: list[list[Statement]] = []
    size = MOST_BATCH_BYTES
    for statement in statements:
        length = len(statement.values[6]) + len(statement.values[7])
        if size + length > MOST_BATCH_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(statement)
        size += length
    return [group[0] if len(group) == 1 else Batch(group) for group in groups]
