"""Computes the points of groups from rollups that were put together by group and step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import numpy as np

from agent360.mesh.metrics.bins import Floats, Ints, middles_of
from agent360.mesh.metrics.frame import BUCKET_S, Frame
from agent360.mesh.metrics.queries.query import Aggregation, Group, Query, Trend

_STEPS: Final = 1 << 32
"""More than a range has steps."""


def evaluate(query: Query, now_s: float, frame: Frame, earlier: Mapping[int, Frame]) -> list[Group]:
    """The groups of an answer, in order.

    Args:
        query: what was asked.
        now_s: Unix time; what a step that is not over has so far is set against its time so far.
        frame: one row for each group and step; its series stand for the groups.
        earlier: the same of the times to compare with, by offset in seconds.
    """
    values = _values(query, frame, now_s)
    trends = [
        _trend(frame, values, offset_s, _values(query, before, now_s), before)
        for offset_s, before in earlier.items()
    ]
    edges = np.searchsorted(frame.row_series, np.arange(len(frame.series) + 1))
    groups = []
    for number, series in enumerate(frame.series):
        rows = slice(int(edges[number]), int(edges[number + 1]))
        if rows.start == rows.stop:
            continue
        groups.append(
            Group(
                series.labels,
                series.unit,
                frame.bucket_s[rows],
                values[rows],
                frame.count[rows],
                tuple(
                    Trend(each.offset_s, each.values[rows], each.ratios[rows]) for each in trends
                ),
            )
        )
    if not query.top_k:
        return sorted(groups, key=lambda group: (group.labels, group.unit))
    return sorted(groups, key=lambda group: (-_size(query, group), group.labels))[: query.top_k]


def _size(query: Query, group: Group) -> float:
    """What groups are compared by: their values over the range; of quantiles the last."""
    values = group.values[:, -1]
    return float(values.sum() if query.aggregation.adds_up else values.mean())


def _values(query: Query, frame: Frame, now_s: float) -> Floats:
    """The values of each row, shape (rows, 1) or (rows, quantiles)."""
    if query.aggregation is Aggregation.QUANTILES:
        return frame.quantiles(query.quantiles)
    columns: Mapping[Aggregation, Callable[[], Floats]] = {
        Aggregation.COUNT: lambda: frame.count.astype(np.float64),
        Aggregation.SUM: lambda: frame.total,
        Aggregation.INCREASE: lambda: frame.total,
        Aggregation.RATE: lambda: frame.total / _seconds(query, frame.bucket_s, now_s),
        Aggregation.MEAN: lambda: frame.total / frame.count,
        Aggregation.MIN: lambda: frame.least,
        Aggregation.MAX: lambda: frame.most,
        Aggregation.LAST: lambda: frame.last,
        Aggregation.SHARE_ABOVE: lambda: _share_above(frame, query.bound),
    }
    return columns[query.aggregation]()[:, None]


def _seconds(query: Query, starts_s: Ints, now_s: float) -> Floats:
    """How much of each step is over, in seconds; at least one bucket."""
    return np.clip(now_s - starts_s, BUCKET_S, query.step_s)


def _share_above(frame: Frame, bound: float) -> Floats:
    above = middles_of(frame.bin_code) > bound
    counts = np.bincount(frame.bin_row[above], weights=frame.bin_count[above], minlength=len(frame))
    shares: Floats = counts / frame.count
    return shares


def _trend(
    frame: Frame,
    values: Floats,
    offset_s: int,
    earlier_values: Floats,
    earlier: Frame,
) -> Trend:
    """The values of the rows of the same groups, so much earlier."""
    places = {series: place for place, series in enumerate(frame.series)}
    moved = [places.get(series, -1) for series in earlier.series]
    numbers = np.array(moved, np.int64)[earlier.row_series] if moved else earlier.row_series
    theirs = _keys(numbers, earlier.bucket_s + offset_s)
    order = np.argsort(theirs)
    ours = _keys(frame.row_series, frame.bucket_s)
    found = np.full_like(values, math.nan)
    if len(theirs):
        at = np.minimum(np.searchsorted(theirs[order], ours), len(theirs) - 1)
        same = theirs[order][at] == ours
        found[same] = earlier_values[order[at[same]]]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(found == 0, math.nan, values / found)
    return Trend(offset_s, found, ratios)


def _keys(numbers: Ints, times_s: Ints) -> Ints:
    return numbers * _STEPS + times_s
