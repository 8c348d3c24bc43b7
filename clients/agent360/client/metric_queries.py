"""Questions about series, and their answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple, overload

from msgspec import Struct

from agent360.metrics.v1 import metrics_pb2 as pb

Aggregation = Literal[
    "count",
    "sum",
    "increase",
    "rate",
    "mean",
    "min",
    "max",
    "last",
    "quantiles",
    "share_above",
]
"""What is computed of each step; see ``Aggregation`` in the contract."""

Operator = Literal["=", "!=", "=~", "!~"]
"""How a label is compared; the last two with an RE2 expression that the whole value matches."""

AGGREGATIONS: Final[Mapping[Aggregation, pb.Aggregation.ValueType]] = {
    "count": pb.AGGREGATION_COUNT,
    "sum": pb.AGGREGATION_SUM,
    "increase": pb.AGGREGATION_INCREASE,
    "rate": pb.AGGREGATION_RATE,
    "mean": pb.AGGREGATION_MEAN,
    "min": pb.AGGREGATION_MIN,
    "max": pb.AGGREGATION_MAX,
    "last": pb.AGGREGATION_LAST,
    "quantiles": pb.AGGREGATION_QUANTILES,
    "share_above": pb.AGGREGATION_SHARE_ABOVE,
}
_OPERATORS: Final[Mapping[Operator, pb.MatchOperator.ValueType]] = {
    "=": pb.MATCH_OPERATOR_EQUAL,
    "!=": pb.MATCH_OPERATOR_NOT_EQUAL,
    "=~": pb.MATCH_OPERATOR_REGEX,
    "!~": pb.MATCH_OPERATOR_NOT_REGEX,
}


class LabelMatch(NamedTuple):
    """A condition on a label.

    Example:
        >>> LabelMatch("code", "!=", "OK")
    """

    label: str
    operator: Operator
    value: str


def metric_query(
    name: str,
    aggregation: Aggregation,
    *,
    where: Sequence[LabelMatch] = (),
    start: datetime | None = None,
    end: datetime | None = None,
    step: timedelta | None = None,
    quantiles: Sequence[float] = (),
    bound: float = 0.0,
    group_by: Sequence[str] = (),
    by_series: bool = False,
    top_k: int = 0,
    compare_to: Sequence[timedelta] = (),
) -> pb.QueryRequest:
    """A question about the series of a metric.

    Args:
        name: of the metric.
        aggregation: what is computed of each step.
        where: conditions on labels; all must hold.
        start: of the range; None: an hour before its end. The same as ``end``: one point.
        end: of the range, not included; None: now.
        step: a multiple of 10 s; each gives a point. None: the whole range gives one.
        quantiles: which, from 0 to 1; for "quantiles".
        bound: for "share_above".
        group_by: series with the same values of these labels are put together.
        by_series: keep every series apart.
        top_k: only so many groups, those with the largest values; 0: all.
        compare_to: trends: compare each point with the one so long before.

    Example:
        >>> day, week = timedelta(days=1), timedelta(days=7)
        >>> query = metric_query("mesh_requests", "rate", group_by=["method"], compare_to=[day])
        >>> async for group in mesh.metrics.query(query):
        ...     print(group.labels, group.points[-1].value, group.points[-1].trends[0].ratio)
    """
    request = pb.QueryRequest(
        name=name,
        aggregation=AGGREGATIONS[aggregation],
        quantiles=quantiles,
        bound=bound,
        group_by=group_by,
        by_series=by_series,
        top_k=top_k,
    )
    request.matchers.extend(matcher_messages(where))
    if start is not None:
        request.start_time.FromDatetime(start)
    if end is not None:
        request.end_time.FromDatetime(end)
    if step is not None:
        request.step.FromTimedelta(step)
    for offset in compare_to:
        request.compare_to.add().FromTimedelta(offset)
    return request


def matcher_messages(where: Sequence[LabelMatch]) -> Iterator[pb.LabelMatcher]:
    """Conditions as the contract has them."""
    for each in where:
        yield pb.LabelMatcher(
            label=each.label, operator=_OPERATORS[each.operator], value=each.value
        )


class PointTrend(Struct, frozen=True, gc=False):
    """How a point compares with an earlier time."""

    offset: timedelta
    """How much earlier."""
    values: tuple[float, ...]
    """The value then, or the quantiles then; NaN if there were no samples."""
    ratios: tuple[float, ...]
    """The present ones divided by these; NaN if there is none or it is zero."""

    @property
    def value(self) -> float:
        """The value then; of quantiles the first."""
        return self.values[0]

    @property
    def ratio(self) -> float:
        """The present value divided by the one then; of quantiles the first."""
        return self.ratios[0]


class Point(Struct, frozen=True, gc=False):
    """What was computed of a step."""

    time: datetime
    """Start of the step."""
    value: float
    """The value; of quantiles the first."""
    quantiles: tuple[float, ...]
    """Those that were asked for; empty for other aggregations."""
    count: int
    """How many samples it was made of."""
    trends: tuple[PointTrend, ...] = ()
    """One for each of ``compare_to``."""


class MetricGroup:
    """Series that were put together, with a point for each step that has samples.

    Example:
        >>> [point.value for point in group.points] == list(group.values)
        True
    """

    __slots__ = ("_message", "labels", "unit")

    def __init__(self, message: pb.Group) -> None:
        self._message = message
        self.labels: Mapping[str, str] = dict(message.labels)
        """The labels they share, of those in ``group_by``."""
        self.unit = message.unit
        """Unit of the values."""

    @property
    def points(self) -> Sequence[Point]:
        """In the order of time; each is made when it is asked for."""
        return _Points(self._message)

    @property
    def times_s(self) -> Sequence[int]:
        """Starts of the steps, in seconds since 1970: a column, for many points."""
        return self._message.times_s

    @property
    def values(self) -> Sequence[float]:
        """The values; of quantiles all of the first point, then all of the second: a column."""
        return self._message.quantiles or self._message.values


class _Points(Sequence[Point]):
    """The points of a group; of columns that a read mask left out all is zero."""

    def __init__(self, message: pb.Group) -> None:
        self._message = message
        columns = (message.times_s, message.counts, message.values)
        self._size = max(len(column) for column in columns)
        self._width = len(message.quantiles) // self._size if self._size else 0

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> Point: ...

    @overload
    def __getitem__(self, place: slice) -> list[Point]: ...

    def __getitem__(self, place: int | slice) -> Point | list[Point]:
        if isinstance(place, slice):
            return [self._point(each) for each in range(*place.indices(self._size))]
        if not -self._size <= place < self._size:
            raise IndexError("there is no such point")
        return self._point(place % self._size)

    def _point(self, place: int) -> Point:
        message, width = self._message, self._width
        quantiles = tuple(message.quantiles[place * width : (place + 1) * width])
        value = message.values[place] if message.values else 0.0
        row = slice(place * max(width, 1), (place + 1) * max(width, 1))
        return Point(
            datetime.fromtimestamp(message.times_s[place] if message.times_s else 0, UTC),
            quantiles[0] if quantiles else value,
            quantiles,
            message.counts[place] if message.counts else 0,
            tuple(
                PointTrend(
                    trend.offset.ToTimedelta(), tuple(trend.values[row]), tuple(trend.ratios[row])
                )
                for trend in message.trends
            ),
        )
