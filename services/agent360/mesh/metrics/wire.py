"""Between messages of the contract and values of the domain; requests are checked here."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Iterable
from typing import Any, Final

from agent360.audit.v1 import audit_pb2
from agent360.client.errors import InvalidRequestError, Violation
from agent360.mesh.metrics.ports import AuditEvent, EventFilter
from agent360.mesh.metrics.query import Aggregation, Group, Matcher, Query
from agent360.mesh.metrics.rollup import Kind, Sample, SeriesId
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.validation import TENANT_PATTERN, TENANT_RULE, Violations
from agent360.metrics.v1 import metrics_pb2 as pb

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,127}")
_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,63}")
_ACTION: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_MAX_LABELS: Final = 16
_MAX_POINTS: Final = 11_000
_MAX_PATTERN: Final = 256
_HOUR_S: Final = 3_600.0

_AGGREGATIONS: Final = {
    pb.AGGREGATION_COUNT: Aggregation.COUNT,
    pb.AGGREGATION_SUM: Aggregation.SUM,
    pb.AGGREGATION_RATE: Aggregation.RATE,
    pb.AGGREGATION_MEAN: Aggregation.MEAN,
    pb.AGGREGATION_MIN: Aggregation.MIN,
    pb.AGGREGATION_MAX: Aggregation.MAX,
    pb.AGGREGATION_LAST: Aggregation.LAST,
    pb.AGGREGATION_QUANTILES: Aggregation.QUANTILES,
}
_REGEX: Final = {pb.MATCH_OPERATOR_REGEX, pb.MATCH_OPERATOR_NOT_REGEX}
_NEGATED: Final = {pb.MATCH_OPERATOR_NOT_EQUAL, pb.MATCH_OPERATOR_NOT_REGEX}


class ReportReader:
    """Reads the messages of one Report stream; knows the series they introduced."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._series: dict[int, SeriesId | str] = {}

    def read(self, request: Any) -> tuple[list[Sample], list[str]]:
        """The samples of a message, and why others are refused.

        Raises:
            InvalidRequestError: the message as a whole is malformed.
        """
        faults = Violations()
        faults.text("reporter_id", request.reporter_id, max_bytes=128)
        faults.require("sequence", request.sequence > 0, "must be positive")
        size = len(request.refs)
        for field in ("values", "offsets_ms", "counts"):
            length = len(getattr(request, field))
            optional = field != "values" and not length
            faults.require(field, optional or length == size, f"must have {size:,} elements")
        faults.raise_if_any()
        for definition in request.definitions:
            self._series[definition.ref] = self._define(definition)
        base_s = time.time()
        if request.HasField("base_time"):
            base_s = request.base_time.ToNanoseconds() / 1e9
        samples: list[Sample] = []
        refused: list[str] = []
        offsets = request.offsets_ms or [0] * size
        counts = request.counts or [1] * size
        for ref, value, offset, count in zip(
            request.refs, request.values, offsets, counts, strict=True
        ):
            series = self._series.get(ref, f"ref {ref} was not introduced")
            if isinstance(series, str):
                refused.append(series)
            elif not math.isfinite(value) or (series.kind is Kind.COUNTER and value < 0):
                refused.append(f"{series.name}: {value} is not a value of its kind")
            else:
                weight = count if series.kind is Kind.DISTRIBUTION else 1
                samples.append(Sample(series, base_s + offset / 1e3, value, weight))
        return samples, refused

    def _define(self, definition: Any) -> SeriesId | str:
        series = definition.series
        call = self._call
        tenant = definition.tenant or call.tenant or call.principal.only_tenant
        if TENANT_PATTERN.fullmatch(tenant) is None:
            return f"{series.name[:128]}: tenant {TENANT_RULE}"
        if not self._call.principal.may_speak_for(tenant):
            return f"{series.name[:128]}: the reporter may not speak for tenant {tenant}"
        if _NAME.fullmatch(series.name) is None:
            return f"{series.name[:128]!r} is not a metric's name"
        labels = dict(series.labels)
        if len(labels) > _MAX_LABELS or not all(
            _LABEL.fullmatch(key) and len(value.encode()) <= 256 for key, value in labels.items()
        ):
            return f"{series.name}: labels are malformed or more than {_MAX_LABELS}"
        if series.kind not in set(Kind):
            return f"{series.name}: kind is missing"
        return SeriesId(
            tenant, series.name, tuple(sorted(labels.items())), Kind(series.kind), series.unit
        )


def read_matchers(matchers: Iterable[Any]) -> tuple[Matcher, ...]:
    """Conditions on labels.

    Raises:
        InvalidRequestError: one is malformed.
    """
    faults, found = Violations(), []
    for index, matcher in enumerate(matchers):
        pattern = None
        faults.matches(f"matchers[{index}].label", matcher.label, _LABEL, "must be a label's name")
        if matcher.operator in _REGEX:
            field = f"matchers[{index}].value"
            if len(matcher.value) > _MAX_PATTERN:
                faults.add(field, f"must be at most {_MAX_PATTERN} characters")
                continue
            try:
                pattern = re.compile(matcher.value)
            except re.error as error:
                faults.add(field, f"is not a regular expression: {error}")
        found.append(Matcher(matcher.label, matcher.operator in _NEGATED, matcher.value, pattern))
    faults.raise_if_any()
    return tuple(found)


def read_query(tenant: str, request: Any, now_s: float) -> Query:
    """A QueryRequest.

    Raises:
        InvalidRequestError: it is malformed or asks for too many points.
    """
    faults = Violations()
    faults.matches("name", request.name, _NAME, "must be a metric's name")
    aggregation = _AGGREGATIONS.get(request.aggregation)
    faults.require("aggregation", aggregation is not None, "is missing or not known")
    end_s = request.end_time.ToNanoseconds() / 1e9 if request.HasField("end_time") else now_s
    start_s = end_s - _HOUR_S
    if request.HasField("start_time"):
        start_s = request.start_time.ToNanoseconds() / 1e9
    faults.require("start_time", start_s < end_s, "must be before end_time")
    step_s = end_s - start_s
    if request.HasField("step"):
        step_s = faults.positive_duration("step", request.step)
    if step_s > 0:
        points = (end_s - start_s) / step_s
        faults.require("step", points <= _MAX_POINTS, f"gives over {_MAX_POINTS:,} points")
    quantiles = tuple(request.quantiles)
    if aggregation is Aggregation.QUANTILES:
        faults.count("quantiles", len(quantiles), at_least=1, at_most=16)
        in_range = all(0 <= q <= 1 for q in quantiles)
        faults.require("quantiles", in_range, "must be from 0 to 1")
    faults.raise_if_any()
    return Query(
        tenant=tenant,
        name=request.name,
        matchers=read_matchers(request.matchers),
        start_s=start_s,
        end_s=end_s,
        step_s=step_s,
        aggregation=aggregation or Aggregation.COUNT,
        quantiles=quantiles,
        group_by=tuple(request.group_by),
        by_series=request.by_series,
        top_k=request.top_k,
    )


def without_page(request: Any) -> bytes:
    """A request's bytes, the same for all of its pages."""
    copy = type(request)()
    copy.CopyFrom(request)
    copy.ClearField("page_token")
    copy.ClearField("page_size")
    return bytes(copy.SerializeToString(deterministic=True))


def group_message(group: Group) -> Any:
    """A wire Group."""
    message = pb.Group(labels=dict(group.labels), unit=group.unit)
    for point in group.points:
        row = message.points.add(value=point.value, quantiles=point.quantiles, count=point.samples)
        row.time.FromNanoseconds(int(point.time_s * 1e9))
    return message


def series_message(series: SeriesId) -> Any:
    """A wire Series."""
    message = pb.Series(name=series.name, unit=series.unit)
    message.kind = int(series.kind)  # type: ignore[assignment]  # an enum's number
    message.labels.update(dict(series.labels))
    return message


def read_event(call: Call, request: Any) -> AuditEvent:
    """An event to record; what the caller left out is filled in.

    Raises:
        InvalidRequestError: it is malformed.
    """
    event = audit_pb2.Event()
    event.CopyFrom(request.event)
    faults = Violations()
    faults.matches("event.action", event.action, _ACTION, f"must match {_ACTION.pattern}")
    faults.text("event.actor", event.actor, max_bytes=256, min_bytes=0)
    faults.text("event.resource", event.resource, max_bytes=512)
    faults.require("event.outcome", bool(event.outcome), "is missing")
    faults.count("event.attributes", len(event.attributes), at_least=0, at_most=32)
    for key, value in event.attributes.items():
        faults.text(f"event.attributes[{key[:64]}]", key, max_bytes=64)
        faults.text(f"event.attributes[{key[:64]}]", value, max_bytes=4_096, min_bytes=0)
    if event.event_id:
        try:
            event.event_id = str(uuid.UUID(event.event_id))
        except ValueError:
            faults.add("event.event_id", "must be a UUID")
    else:
        event.event_id = str(uuid.uuid4())
    faults.raise_if_any()
    if not event.HasField("event_time"):
        event.event_time.FromNanoseconds(time.time_ns())
    event.tenant = call.tenant
    event.actor = event.actor or call.principal.name
    event.trace_id = event.trace_id or call.traceparent[3:35]
    event.request_id = event.request_id or call.request_id
    return AuditEvent(
        call.tenant,
        event.event_id,
        event.event_time.ToMicroseconds(),
        event.actor,
        event.action,
        event.resource,
        event.SerializeToString(),
    )


def read_event_filter(tenant: str, request: Any) -> EventFilter:
    """The filter of a ListEventsRequest.

    Raises:
        InvalidRequestError: the range is empty.
    """
    wanted = request.filter
    start_us = wanted.start_time.ToMicroseconds() if wanted.HasField("start_time") else None
    end_us = wanted.end_time.ToMicroseconds() if wanted.HasField("end_time") else None
    if start_us is not None and end_us is not None and start_us >= end_us:
        raise InvalidRequestError([Violation("filter.end_time", "must be after start_time")])
    return EventFilter(tenant, start_us, end_us, wanted.actor, wanted.action, wanted.resource)
