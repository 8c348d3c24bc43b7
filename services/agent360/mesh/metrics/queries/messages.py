"""Answers as messages of the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from agent360.mesh.metrics.queries.query import Group, labels_of
from agent360.mesh.metrics.series import SeriesId
from agent360.metrics.v1 import metrics_pb2 as pb


def group_message(group: Group, *, quantiles: bool) -> Any:
    """A wire Group."""
    message = pb.Group(labels=dict(group.labels), unit=group.unit)
    message.times_s.extend(group.times_s.tolist())
    column = message.quantiles if quantiles else message.values
    column.extend(group.values.ravel().tolist())
    message.counts.extend(group.counts.tolist())
    for trend in group.trends:
        row = message.trends.add()
        row.offset.seconds = trend.offset_s
        row.values.extend(trend.values.ravel().tolist())
        row.ratios.extend(trend.ratios.ravel().tolist())
    return message


def group_messages(
    groups: Iterable[Group], masked: Callable[[Any], Any], *, quantiles: bool
) -> list[Any]:
    """Wire Groups with the fields that a mask names."""
    return [masked(group_message(group, quantiles=quantiles)) for group in groups]


def series_message(series: SeriesId, tenant: str | None) -> Any:
    """A wire Series, as a caller sees it who asks about ``tenant``; None: about all."""
    message = pb.Series(name=series.name, unit=series.unit)
    message.kind = int(series.kind)  # type: ignore[assignment]  # an enum's number
    message.labels.update(labels_of(series, tenant))
    return message


def without_page(request: Any) -> bytes:
    """A request's bytes, the same for all of its pages."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("page_token")
    copy.ClearField("page_size")
    return bytes(copy.SerializeToString(deterministic=True))
