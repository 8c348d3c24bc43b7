"""The stored form of rollups: a blob of rows and a blob of bins for a series and a block of time.

Both are arrays of fixed, little-endian records, so that the blobs of many blocks are read at once
by putting them behind one another.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from agent360.mesh.metrics.bins import Ints
from agent360.mesh.metrics.frame import Frame
from agent360.mesh.metrics.series import SeriesId

_ROW: Final = np.dtype(
    [
        ("bucket_s", "<i8"), ("count", "<i8"), ("total", "<f8"), ("least", "<f8"),
        ("most", "<f8"), ("last", "<f8"), ("last_time_s", "<f8"), ("bins", "<u4"),
    ]
)  # fmt: skip
_ROW_NAMES: Final = tuple(_ROW.names or ())
_BIN: Final = np.dtype([("code", "<i4"), ("count", "<u4")])
_MOST: Final = 2**32 - 1


class Block(NamedTuple):
    """The rollups of one series in one block of time."""

    series: int
    """Its number, as in ``Frame.row_series``."""
    start_s: int
    """Start of the block, Unix time."""
    rows: bytes
    bins: bytes


def blocks_of(frame: Frame, block_s: int) -> Iterator[Block]:
    """Divides a frame into blocks.

    Args:
        frame: from ``Frame.merged``, ``regrouped`` or ``coarser``.
        block_s: length of a block in seconds.
    """
    if not len(frame):
        return
    bin_row, bin_code, bin_count = _within_u4(frame)
    bin_edges = np.searchsorted(bin_row, np.arange(len(frame) + 1))
    rows = np.empty(len(frame), _ROW)
    for name in _ROW_NAMES[:-1]:
        rows[name] = getattr(frame, name)
    rows["bins"] = np.diff(bin_edges)
    bins = np.empty(len(bin_row), _BIN)
    bins["code"], bins["count"] = bin_code, bin_count
    starts = frame.bucket_s // block_s * block_s
    changes = (np.diff(frame.row_series) != 0) | (np.diff(starts) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(frame)]
    numbers, block_starts = frame.row_series.tolist(), starts.tolist()
    cuts = bin_edges[edges].tolist()
    row_bytes, bin_bytes = rows.tobytes(), bins.tobytes()
    for place, (begin, end) in enumerate(itertools.pairwise(edges)):
        yield Block(
            numbers[begin],
            block_starts[begin],
            row_bytes[begin * _ROW.itemsize : end * _ROW.itemsize],
            bin_bytes[cuts[place] * _BIN.itemsize : cuts[place + 1] * _BIN.itemsize],
        )


def frame_of(
    series: Sequence[SeriesId], blocks: Sequence[tuple[int, bytes, bytes | None]]
) -> Frame:
    """Puts blocks together; the rows are not merged.

    Args:
        series: what the numbers of the blocks stand for.
        blocks: series number, rows and bins of each; no bins if they are not wanted of any.
    """
    if not blocks:
        return Frame.empty(series)
    numbers, row_blobs, bin_blobs = zip(*blocks, strict=True)
    rows = np.frombuffer(b"".join(row_blobs), _ROW)
    with_bins = bin_blobs[0] is not None
    bins = np.frombuffer(b"".join(bin_blobs) if with_bins else b"", _BIN)
    lengths = [len(blob) // _ROW.itemsize for blob in row_blobs]
    columns: list[Any] = [np.repeat(np.array(numbers, np.int64), lengths)]
    columns += [np.ascontiguousarray(rows[name]) for name in _ROW_NAMES[:-1]]
    columns.append(np.repeat(np.arange(len(rows)), rows["bins"] if with_bins else 0))
    columns += [bins[name].astype(np.int64) for name in ("code", "count")]
    return Frame(series, *columns)


def _within_u4(frame: Frame) -> tuple[Ints, Ints, Ints]:
    """The bins; a count that is too large for the stored form becomes several."""
    counts = frame.bin_count
    if not len(counts) or counts.max() <= _MOST:
        return frame.bin_row, frame.bin_code, counts
    pieces = (counts + _MOST - 1) // _MOST
    places = np.repeat(np.arange(len(counts)), pieces)
    firsts = np.repeat(np.cumsum(pieces) - pieces, pieces)
    is_first = np.arange(len(places)) == firsts
    rest = counts - (pieces - 1) * _MOST
    return frame.bin_row[places], frame.bin_code[places], np.where(is_first, rest[places], _MOST)
