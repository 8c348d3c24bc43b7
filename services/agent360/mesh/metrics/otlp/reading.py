"""Reads an ExportMetricsServiceRequest: data points become samples."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from agent360.mesh.metrics.frame import Columns
from agent360.mesh.metrics.naming import admit
from agent360.mesh.metrics.otlp.attributes import labels_of, name_of
from agent360.mesh.metrics.otlp.cumulative import (
    PREFIX,
    SUM,
    Followed,
    StaleTotalError,
    TooManyTotalsError,
    Total,
    Totals,
)
from agent360.mesh.metrics.otlp.histograms import (
    Bucket,
    explicit_buckets,
    exponential_buckets,
    weighted_values,
)
from agent360.mesh.metrics.ports import Mark
from agent360.mesh.metrics.rejections import Reason, Refused
from agent360.mesh.metrics.report import AcceptedTimes
from agent360.mesh.metrics.series import Kind
from agent360.mesh.metrics.series_table import SeriesTable

_DELTA: Final = 1
_CUMULATIVE: Final = 2
_NO_VALUE: Final = 1
"""Bit of a point's flags: it says only that there is no value."""

_VALUE: Final = "value"
_ZEROS: Final = "zeros"


class _Source(NamedTuple):
    """The metric that points belong to."""

    metric: Any
    name: str
    labels: Mapping[str, str]
    """Of the resource."""
    identity: bytes
    """Of resource, scope and metric: tells cumulative series apart that share a series of ours."""


class _Refusal(Exception):  # noqa: N818 - it says why a point is refused
    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


_COUNT_BOUND: Final = 1 << 53
"""Counts are followed as floats, which are exact below this."""


class ExportReader:
    """Reads one request of one tenant."""

    def __init__(
        self,
        tenant: str,
        table: SeriesTable,
        totals: Totals,
        times: AcceptedTimes,
        resource_labels: frozenset[str],
        now_s: float,
    ) -> None:
        self._tenant = tenant
        self._table = table
        self._totals = totals
        self._times = times
        self._resource_labels = resource_labels
        self._now_s = now_s
        self._rows: list[tuple[int, float, float, int]] = []
        self.marks: dict[str, Mark] = {}
        """How far its cumulative series have come."""
        self.refused: list[Refused] = []
        """Why points were refused, one for each."""

    def read(self, request: Any) -> Columns:
        """The samples of all points that can be taken."""
        for resource_metrics in request.resource_metrics:
            attributes = resource_metrics.resource.attributes
            labels = labels_of(each for each in attributes if each.key in self._resource_labels)
            resource = resource_metrics.resource.SerializeToString(deterministic=True)
            for scope_metrics in resource_metrics.scope_metrics:
                scope = scope_metrics.scope
                before = resource + f"\0{scope.name}\0{scope.version}\0".encode()
                for metric in scope_metrics.metrics:
                    identity = before + f"{metric.name}\0{metric.unit}".encode()
                    self._read_metric(_Source(metric, name_of(metric.name), labels, identity))
        numbers, times_s, values, weights = (
            zip(*self._rows, strict=True) if self._rows else [()] * 4
        )
        return Columns(
            np.array(numbers, np.int64),
            np.array(times_s, np.float64),
            np.array(values, np.float64),
            np.array(weights, np.int64),
        )

    def _read_metric(self, source: _Source) -> None:
        kind = source.metric.WhichOneof("data")
        if kind is None:
            return
        data = getattr(source.metric, kind)
        read = self._reader(kind, data)
        for point in data.data_points:
            if point.flags & _NO_VALUE:
                continue
            try:
                if isinstance(read, _Refusal):
                    raise read
                self._check_time(point)
                read(source, point)
            except _Refusal as refusal:
                text = f"{source.name[:128]}: {refusal}"
                self.refused.append(Refused(refusal.reason, text, self._tenant))

    def _reader(self, kind: str, data: Any) -> Callable[[_Source, Any], None] | _Refusal:
        """What reads the points of a metric, or why they are not taken."""
        if kind == "gauge":
            return self._read_gauge
        temporality = getattr(data, "aggregation_temporality", 0)
        if kind == "summary":
            return _Refusal(Reason.KIND, "summaries are not taken; use a histogram")
        if temporality not in (_DELTA, _CUMULATIVE):
            return _Refusal(Reason.KIND, "the aggregation temporality is missing")
        cumulative = temporality == _CUMULATIVE
        if kind == "sum" and not data.is_monotonic:
            if cumulative:
                return self._read_gauge
            return _Refusal(
                Reason.KIND, "increases that may be negative are not taken; export cumulative sums"
            )
        readers = {
            "sum": self._read_sum,
            "histogram": self._read_histogram,
            "exponential_histogram": self._read_exponential,
        }
        read = readers[kind]
        return lambda source, point: read(source, point, cumulative)

    # ---------------------------------------------------------------- points

    def _read_gauge(self, source: _Source, point: Any) -> None:
        self._add(source, point, Kind.GAUGE, [(_number_of(point), 1)])

    def _read_sum(self, source: _Source, point: Any, cumulative: bool) -> None:
        value = _number_of(point)
        if value < 0:
            raise _Refusal(Reason.VALUE, f"{value} is not a value of a monotonic sum")
        if cumulative:
            followed = self._follow(source, point, {_VALUE: value}, 0)
            if followed.increase is None:
                return
            value = followed.increase[_VALUE]
        self._add(source, point, Kind.COUNTER, [(value, 1)])

    def _read_histogram(self, source: _Source, point: Any, cumulative: bool) -> None:
        bounds = list(point.explicit_bounds)
        _check_histogram(point, (*point.bucket_counts, point.count), bounds)
        if len(point.bucket_counts) not in (0, len(bounds) + 1) or bounds != sorted(bounds):
            raise _Refusal(Reason.VALUE, "its buckets do not fit its bounds")
        counts = dict(enumerate(point.bucket_counts or (point.count,)))
        total = point.sum if point.HasField("sum") else None
        if cumulative:
            numbers = {str(place): float(count) for place, count in counts.items() if count}
            shape = ",".join(map(repr, bounds))
            followed = self._follow(source, point, _with_sum(numbers, total), 0, shape)
            if followed.increase is None:
                return
            total = followed.increase.pop(SUM, None)
            counts = {int(place): int(count) for place, count in followed.increase.items()}
        least = point.min if point.HasField("min") else None
        most = point.max if point.HasField("max") else None
        self._add_buckets(source, point, explicit_buckets(bounds, counts, least, most), total)

    def _read_exponential(self, source: _Source, point: Any, cumulative: bool) -> None:
        counts = (*point.positive.bucket_counts, *point.negative.bucket_counts)
        _check_histogram(point, (*counts, point.zero_count, point.count), ())
        numbers: dict[str, float] = {
            f"{sign}{buckets.offset + place}": float(count)
            for sign, buckets in (("p", point.positive), ("n", point.negative))
            for place, count in enumerate(buckets.bucket_counts)
            if count
        }
        numbers[_ZEROS] = float(point.zero_count)
        total, scale = point.sum if point.HasField("sum") else None, point.scale
        if cumulative:
            followed = self._follow(source, point, _with_sum(numbers, total), scale)
            if followed.increase is None:
                return
            numbers, scale = followed.increase, followed.scale
            total = numbers.pop(SUM, None)
        zeros = int(numbers.pop(_ZEROS, 0))
        signs = {
            sign: {int(name[1:]): int(n) for name, n in numbers.items() if name[0] == sign}
            for sign in "pn"
        }
        self._add_buckets(
            source, point, exponential_buckets(scale, signs["p"], signs["n"], zeros), total
        )

    def _add_buckets(
        self, source: _Source, point: Any, buckets: list[Bucket], total: float | None
    ) -> None:
        try:
            values = weighted_values(buckets, total)
        except (OverflowError, ValueError):
            values = [(math.nan, 1)]
        if not all(math.isfinite(value) for value, _ in values):
            raise _Refusal(Reason.VALUE, "its buckets are too wide to have values")
        self._add(source, point, Kind.DISTRIBUTION, values)

    def _add(
        self, source: _Source, point: Any, kind: Kind, values: Iterable[tuple[float, int]]
    ) -> None:
        labels = {**source.labels, **labels_of(point.attributes)}
        unit = source.metric.unit
        found = admit(self._table, self._tenant, source.name, labels, kind, unit)
        if isinstance(found, Refused):
            self.refused.append(found)
            return
        time_s = point.time_unix_nano / 1e9
        self._rows += [(found, time_s, value, weight) for value, weight in values]

    def _follow(
        self, source: _Source, point: Any, numbers: dict[str, float], scale: int, shape: str = ""
    ) -> Followed:
        labels = sorted(each.SerializeToString(deterministic=True) for each in point.attributes)
        digest = hashlib.blake2b(digest_size=16)
        for part in (self._tenant.encode(), source.identity, shape.encode(), *labels):
            digest.update(len(part).to_bytes(4, "big") + part)
        name = PREFIX + digest.hexdigest()
        total = Total(point.start_time_unix_nano, point.time_unix_nano, numbers, scale)
        try:
            followed = self._totals.follow(name, total, self.marks)
        except TooManyTotalsError:
            raise _Refusal(
                Reason.CARDINALITY,
                "as many cumulative series are followed as may be (otlp.max_cumulative)",
            ) from None
        except StaleTotalError:
            raise _Refusal(Reason.TIME, "is from before a restart that was seen") from None
        if followed.mark is not None:
            self.marks[name] = followed.mark
        return followed

    def _check_time(self, point: Any) -> None:
        age_s = self._now_s - point.time_unix_nano / 1e9
        if age_s > self._times.late_s:
            raise _Refusal(Reason.TIME, f"is older than {self._times.late_s:,.0f} s")
        if -age_s > self._times.early_s:
            text = f"is over {self._times.early_s:,.0f} s in the future"
            raise _Refusal(Reason.TIME, text)


def _number_of(point: Any) -> float:
    value = point.as_int if point.WhichOneof("value") == "as_int" else point.as_double
    if not math.isfinite(value):
        raise _Refusal(Reason.VALUE, f"{value} is not a number")
    return float(value)


def _check_histogram(point: Any, counts: Sequence[int], bounds: Sequence[float]) -> None:
    """Refuses what would follow the series into its rollups, or into what it had counted."""
    if any(count >= _COUNT_BOUND for count in counts) or sum(counts) >= _COUNT_BOUND:
        raise _Refusal(Reason.VALUE, f"its counts are not below {_COUNT_BOUND:,}")
    if any(math.isnan(bound) for bound in bounds):
        raise _Refusal(Reason.VALUE, "its buckets do not fit its bounds")
    for field in ("sum", "min", "max"):
        if point.HasField(field) and not math.isfinite(number := getattr(point, field)):
            raise _Refusal(Reason.VALUE, f"its {field}, {number}, is not a number")


def _with_sum(numbers: dict[str, float], total: float | None) -> dict[str, float]:
    return numbers if total is None else {**numbers, SUM: total}
