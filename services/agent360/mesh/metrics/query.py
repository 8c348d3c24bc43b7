"""Queries: rollups chosen by labels, put together by group and step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from agent360.mesh.metrics.rollup import BUCKET_S, Rollup, SeriesId


class Aggregation(Enum):
    """What is computed from the rollups of a step."""

    COUNT = "count"
    SUM = "sum"
    RATE = "rate"
    MEAN = "mean"
    MIN = "min"
    MAX = "max"
    LAST = "last"
    QUANTILES = "quantiles"


class Matcher(NamedTuple):
    """A condition on a label."""

    label: str
    negated: bool
    value: str
    pattern: re.Pattern[str] | None

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels meet it; an absent label is empty."""
        actual = labels.get(self.label, "")
        met = self.pattern.fullmatch(actual) is not None if self.pattern else actual == self.value
        return met is not self.negated


@dataclass(frozen=True, slots=True)
class Query:
    """A question about the series of one tenant."""

    tenant: str
    name: str
    matchers: tuple[Matcher, ...]
    start_s: float
    end_s: float
    step_s: float
    aggregation: Aggregation
    quantiles: tuple[float, ...] = ()
    group_by: tuple[str, ...] = ()
    by_series: bool = False
    top_k: int = 0


class Point(NamedTuple):
    """A value at the start of a step."""

    time_s: float
    value: float
    quantiles: tuple[float, ...]
    samples: int


class Group(NamedTuple):
    """Series that were put together."""

    labels: tuple[tuple[str, str], ...]
    unit: str
    points: tuple[Point, ...]


def answer(query: Query, rows: Iterable[tuple[SeriesId, int, Rollup]]) -> list[Group]:
    """Computes the groups of a query from the rollups in its range."""
    steps: dict[tuple[tuple[str, str], ...], dict[int, Rollup]] = {}
    units: dict[tuple[tuple[str, str], ...], str] = {}
    for series, bucket_s, rollup in rows:
        labels = dict(series.labels)
        key = (
            series.labels
            if query.by_series
            else tuple((label, labels.get(label, "")) for label in query.group_by)
        )
        step = int((bucket_s - query.start_s) // query.step_s) if bucket_s > query.start_s else 0
        merged = steps.setdefault(key, {}).setdefault(step, Rollup())
        merged.merge(rollup)
        units.setdefault(key, series.unit)
    groups = [
        Group(
            key,
            units[key],
            tuple(_point(query, step, rollup) for step, rollup in sorted(by_step.items())),
        )
        for key, by_step in steps.items()
    ]
    if query.top_k:
        groups.sort(key=lambda group: -sum(point.value for point in group.points))
        return groups[: query.top_k]
    return sorted(groups)


def _point(query: Query, step: int, rollup: Rollup) -> Point:
    quantiles: tuple[float, ...] = ()
    value = 0.0
    if query.aggregation is Aggregation.QUANTILES:
        quantiles = tuple(rollup.sketch.quantile(q) for q in query.quantiles)
    else:
        value = _VALUES[query.aggregation](rollup, max(query.step_s, BUCKET_S))
    return Point(query.start_s + step * query.step_s, value, quantiles, rollup.count)


_VALUES: Mapping[Aggregation, Callable[[Rollup, float], float]] = {
    Aggregation.COUNT: lambda rollup, _: float(rollup.count),
    Aggregation.SUM: lambda rollup, _: rollup.total,
    Aggregation.RATE: lambda rollup, step_s: rollup.total / step_s,
    Aggregation.MEAN: lambda rollup, _: rollup.total / rollup.count,
    Aggregation.MIN: lambda rollup, _: rollup.least,
    Aggregation.MAX: lambda rollup, _: rollup.most,
    Aggregation.LAST: lambda rollup, _: rollup.last,
}
