"""Rollups of many series and buckets, kept and merged as columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from agent360.mesh.metrics.bins import CODE_SPAN, Floats, Ints, codes_of, quantiles_of
from agent360.mesh.metrics.series import Kind, SeriesId

T = TypeVar("T", np.int64, np.float64)

BUCKET_S: Final = 10
"""Length of the shortest bucket, in seconds."""

_HALF_SPAN: Final = CODE_SPAN >> 1
_DENSE: Final = 4
_BUCKETS: Final = 1 << 36
"""More than there are bucket starts, in seconds, in two thousand years."""


class Columns(NamedTuple):
    """Samples, one an element of each column."""

    series: Ints
    """Numbers of a series table."""
    times_s: Floats
    """Unix time."""
    values: Floats
    weights: Ints
    """How many observations had the value; 1 for counters and gauges."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Rollups in columns: element i of each ``row`` column belongs to row i.

    A row is what is kept of one series in one bucket of time: how many samples, their sum, the
    least, the most, the last with its time, and, of distributions, the bins of a sketch. Frames
    from ``merged`` and ``regrouped`` have one row for each series and bucket, in that order, and
    the bins of a row ascending and next to each other.
    """

    series: Sequence[SeriesId]
    """What the numbers in ``row_series`` stand for: series ``row_series[i]`` of this list."""
    row_series: Ints
    bucket_s: Ints
    """Start of the bucket, Unix time."""
    count: Ints
    total: Floats
    least: Floats
    most: Floats
    last: Floats
    last_time_s: Floats
    bin_row: Ints
    """Which row a bin belongs to."""
    bin_code: Ints
    """Which bin; see ``bins``."""
    bin_count: Ints
    """How many observations are in it."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_series)

    @classmethod
    def empty(cls, series: Sequence[SeriesId] = ()) -> Self:
        """No rows."""
        ints, floats = np.zeros(0, np.int64), np.zeros(0)
        return cls(
            series, ints, ints, ints, floats, floats, floats, floats, floats, ints, ints, ints
        )

    @classmethod
    def of_samples(
        cls, series: Sequence[SeriesId], columns: Columns, kinds: npt.NDArray[np.uint8]
    ) -> Self:
        """Rolls samples up into buckets of ``BUCKET_S``, except values that are no numbers.

        Those are refused where they come in. One that came through all the same, and is in a
        journal, must not make what all others reported unreadable.

        Args:
            series: what the numbers of the samples stand for.
            columns: the samples, in the order in which they came.
            kinds: of each sample's series.
        """
        finite = np.isfinite(columns.values)
        if not finite.all():
            kept: list[Any] = [column[finite] for column in columns]
            columns, kinds = Columns(*kept), kinds[finite]
        buckets = (columns.times_s // BUCKET_S).astype(np.int64) * BUCKET_S
        order, starts = _groups(columns.series, buckets)
        values, weights = columns.values[order], columns.weights[order]
        times, row_of = columns.times_s[order], _row_of(starts, len(order))
        firsts = order[starts]
        latest = np.maximum.reduceat(times, starts) if len(starts) else times
        bin_row, bin_code, bin_count = _bins_of_samples(
            row_of, values, weights, kinds[order] == Kind.DISTRIBUTION
        )
        return cls(
            series,
            columns.series[firsts],
            buckets[firsts],
            _sums(weights, starts),
            _sums(values * weights, starts),
            np.minimum.reduceat(values, starts) if len(starts) else values,
            np.maximum.reduceat(values, starts) if len(starts) else values,
            _lasts(values, times, latest, row_of),
            latest,
            bin_row,
            bin_code,
            bin_count,
        )

    @classmethod
    def merged(cls, frames: Sequence[Frame]) -> Frame:
        """Adds frames up, those last in the list being the latest where times are equal."""
        joined = cls.joined(frames)
        return joined.coarser(1)

    @classmethod
    def joined(cls, frames: Sequence[Frame]) -> Frame:
        """Puts frames behind one another; a series and bucket may have several rows then."""
        frames = [frame for frame in frames if len(frame)] or frames[:1]
        if len(frames) <= 1:
            return frames[0] if frames else cls.empty()
        series = frames[0].series
        if any(frame.series is not series for frame in frames):
            series, frames = _on_one_list(frames)
        return _joined(series, frames)

    def regrouped(self, group: Ints, bucket_s: Ints, series: Sequence[SeriesId]) -> Frame:
        """Puts rows together that share a group and a bucket.

        Args:
            group: of each row: its place in ``series`` of the result.
            bucket_s: of each row: its bucket in the result.
            series: what the groups stand for.
        """
        reduced = self._reduced(group, bucket_s)
        return Frame(series, *reduced.columns())

    def coarser(self, length_s: int) -> Frame:
        """The same in buckets of another length, a multiple of the present one."""
        return self._reduced(self.row_series, self.bucket_s // length_s * length_s)

    def chosen(self, rows: npt.NDArray[np.bool_]) -> Frame:
        """The rows where ``rows`` is true."""
        if rows.all():
            return self
        kept = np.flatnonzero(rows)
        place = np.cumsum(rows) - 1
        bins = rows[self.bin_row]
        columns: list[Any] = [column[kept] for column in self.columns()[:8]]
        columns += [place[self.bin_row[bins]], self.bin_code[bins], self.bin_count[bins]]
        return Frame(self.series, *columns)

    def within(self, start_s: float, end_s: float) -> Frame:
        """The rows whose buckets begin in a range of time."""
        return self.chosen((self.bucket_s >= start_s) & (self.bucket_s < end_s))

    def quantiles(self, wanted: Sequence[float]) -> Floats:
        """Quantiles of each row, shape (rows, wanted); NaN for rows without bins.

        Within 1% of the true value. The rows must be of ``merged``, ``regrouped`` or ``coarser``.
        """
        edges = np.searchsorted(self.bin_row, np.arange(len(self) + 1))
        found = quantiles_of(self.bin_code, self.bin_count, edges, np.array(wanted))
        clipped: Floats = np.clip(found, self.least[:, None], self.most[:, None])
        return clipped

    def columns(self) -> tuple[Any, ...]:
        """All columns, in the order of the fields: eight of rows, three of bins."""
        return (
            self.row_series, self.bucket_s, self.count, self.total, self.least, self.most,
            self.last, self.last_time_s, self.bin_row, self.bin_code, self.bin_count,
        )  # fmt: skip

    @property
    def size_bytes(self) -> int:
        """Memory of the columns."""
        return sum(column.nbytes for column in self.columns())

    def _reduced(self, group: Ints, bucket_s: Ints) -> Frame:
        if not len(group):
            return self
        order, starts = _groups(group, bucket_s)
        if len(starts) == len(order):
            return self._ordered(order, group, bucket_s)
        row_of = _row_of(starts, len(order))
        times = self.last_time_s[order]
        latest = np.maximum.reduceat(times, starts)
        new_row = np.empty(len(order), np.int64)
        new_row[order] = row_of
        return Frame(
            self.series,
            group[order[starts]],
            bucket_s[order[starts]],
            _sums(self.count[order], starts),
            _sums(self.total[order], starts),
            np.minimum.reduceat(self.least[order], starts),
            np.maximum.reduceat(self.most[order], starts),
            _lasts(self.last[order], times, latest, row_of),
            latest,
            *_added_bins(new_row[self.bin_row], self.bin_code, self.bin_count),
        )

    def _ordered(self, order: Ints, group: Ints, bucket_s: Ints) -> Frame:
        """What ``_reduced`` gives where no two rows come together."""
        new_row = np.empty(len(order), np.int64)
        new_row[order] = np.arange(len(order))
        bins = _added_bins(new_row[self.bin_row], self.bin_code, self.bin_count)
        columns: list[Any] = [group, bucket_s, *self.columns()[2:8]]
        return Frame(self.series, *[column[order] for column in columns] + [*bins])


def _groups(first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """Sorts by two keys, equal ones in their order: the order, and where each group starts."""
    keys = first * _BUCKETS + second
    if len(keys) and (keys[1:] >= keys[:-1]).all():
        order = np.arange(len(keys))
    else:
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
    return order, _starts(keys)


def _starts(keys: Ints) -> Ints:
    if not len(keys):
        return np.zeros(0, np.int64)
    return np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1))


def _row_of(starts: Ints, size: int) -> Ints:
    return np.repeat(np.arange(len(starts)), np.diff(starts, append=size))


def _sums(values: npt.NDArray[T], starts: Ints) -> npt.NDArray[T]:
    return np.add.reduceat(values, starts) if len(starts) else values


def _lasts(values: Floats, times: Floats, latest: Floats, row_of: Ints) -> Floats:
    """The last value of each row: of those with the latest time, the one that came last."""
    lasts = np.empty(len(latest))
    at_latest = np.flatnonzero(times == latest[row_of])
    lasts[row_of[at_latest]] = values[at_latest]
    return lasts


def _bins_of_samples(
    row_of: Ints, values: Floats, weights: Ints, sketched: npt.NDArray[np.bool_]
) -> tuple[Ints, Ints, Ints]:
    if not sketched.all():
        row_of, values, weights = row_of[sketched], values[sketched], weights[sketched]
    return _added_bins(row_of, codes_of(values), weights)


def _added_bins(rows: Ints, codes: Ints, counts: Ints) -> tuple[Ints, Ints, Ints]:
    """Adds up the counts of equal bins of a row."""
    if not len(rows):
        return rows, codes, counts
    lowest = int(codes.min())
    span = int(codes.max()) - lowest + 1
    cells = (int(rows.max()) + 1) * span
    if cells <= _DENSE * len(rows):
        # Counting in a table of all bins of all rows beats sorting where that is not too thin.
        table = np.bincount(rows * span + (codes - lowest), weights=counts, minlength=cells)
        keys = np.flatnonzero(table)
        return keys // span, keys % span + lowest, table[keys].astype(np.int64)
    keys = rows * CODE_SPAN + (codes + _HALF_SPAN)
    if not (keys[1:] > keys[:-1]).all():
        order = np.argsort(keys, kind="stable")
        starts = _starts(keys[order])
        keys, counts = keys[order[starts]], _sums(counts[order], starts)
    return keys // CODE_SPAN, keys % CODE_SPAN - _HALF_SPAN, counts


def _joined(series: Sequence[SeriesId], frames: Sequence[Frame]) -> Frame:
    rows_before = np.cumsum([0, *(len(frame) for frame in frames)])[:-1]
    columns = [np.concatenate(each) for each in zip(*(f.columns() for f in frames), strict=True)]
    columns[8] = np.concatenate(
        [frame.bin_row + before for frame, before in zip(frames, rows_before, strict=True)]
    )
    return Frame(series, *columns)


def _on_one_list(frames: Sequence[Frame]) -> tuple[list[SeriesId], list[Frame]]:
    """The frames with numbers that mean the same in all of them."""
    places: dict[SeriesId, int] = {}
    moved = []
    for frame in frames:
        used, inverse = np.unique(frame.row_series, return_inverse=True)
        new = [places.setdefault(frame.series[number], len(places)) for number in used]
        row_series = np.array(new, np.int64)[inverse] if new else frame.row_series
        moved.append((frame, row_series))
    series = list(places)
    return series, [Frame(series, row_series, *frame.columns()[1:]) for frame, row_series in moved]
