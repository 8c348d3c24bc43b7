"""Reads queries from messages of the contract; every fault is found and named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import re2
from google.protobuf.timestamp_pb2 import Timestamp

from agent360.mesh.metrics.frame import BUCKET_S
from agent360.mesh.metrics.queries.query import Aggregation, Matcher, Query
from agent360.mesh.metrics.series import LABEL, NAME
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.validation import Violations, seconds_of
from agent360.metrics.v1 import metrics_pb2 as pb

MAX_MATCHERS: Final = 32
_MAX_STEPS: Final = 11_000
_MAX_PATTERN: Final = 256
_MAX_QUANTILES: Final = 16
_MAX_OFFSETS: Final = 4
_MAX_LABELS: Final = 16
_HOUR_S: Final = 3_600
_INSTANT_S: Final = 300
_LATEST_S: Final = 1 << 33

_AGGREGATIONS: Final = {
    pb.AGGREGATION_COUNT: Aggregation.COUNT,
    pb.AGGREGATION_SUM: Aggregation.SUM,
    pb.AGGREGATION_INCREASE: Aggregation.INCREASE,
    pb.AGGREGATION_RATE: Aggregation.RATE,
    pb.AGGREGATION_MEAN: Aggregation.MEAN,
    pb.AGGREGATION_MIN: Aggregation.MIN,
    pb.AGGREGATION_MAX: Aggregation.MAX,
    pb.AGGREGATION_LAST: Aggregation.LAST,
    pb.AGGREGATION_QUANTILES: Aggregation.QUANTILES,
    pb.AGGREGATION_SHARE_ABOVE: Aggregation.SHARE_ABOVE,
}
_PATTERNS: Final = {pb.MATCH_OPERATOR_REGEX, pb.MATCH_OPERATOR_NOT_REGEX}
_NEGATED: Final = {pb.MATCH_OPERATOR_NOT_EQUAL, pb.MATCH_OPERATOR_NOT_REGEX}


def _quiet() -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 20
    return options


_OPTIONS: Final = _quiet()


def asked_tenant(call: Call) -> str | None:
    """Whose series a call is about; None: those of all tenants."""
    return None if call.all_tenants else call.tenant


def compiled(expression: str) -> Any:
    """An RE2 expression, which is matched in linear time.

    Raises:
        re2.error: it is malformed.
    """
    return re2.compile(expression, _OPTIONS)


def read_matchers(faults: Violations, matchers: Iterable[Any]) -> tuple[Matcher, ...]:
    """Conditions on labels; expressions are RE2's, which are matched in linear time."""
    found = []
    for index, matcher in enumerate(matchers):
        field = f"matchers[{index}]"
        faults.matches(f"{field}.label", matcher.label, LABEL, "must be a label's name")
        is_pattern = matcher.operator in _PATTERNS
        expression = None
        if is_pattern and len(matcher.value) > _MAX_PATTERN:
            faults.add(f"{field}.value", f"must be at most {_MAX_PATTERN} characters")
        elif is_pattern:
            try:
                expression = compiled(matcher.value)
            except re2.error as error:
                faults.add(f"{field}.value", f"is not an RE2 expression: {_told(error)}")
        negated = matcher.operator in _NEGATED
        found.append(Matcher(matcher.label, negated, matcher.value, is_pattern, expression))
    faults.count("matchers", len(found), at_least=0, at_most=MAX_MATCHERS)
    return tuple(found)


def read_query(tenant: str | None, request: Any, now_s: float) -> Query:
    """A QueryRequest.

    Args:
        tenant: whose series; None: those of all tenants.
        request: what is asked.
        now_s: Unix time.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    start_s, end_s, step_s = _read_range(faults, request, now_s)
    query = _read_question(faults, tenant, request, start_s, end_s, step_s)
    faults.raise_if_any()
    return query


def read_question(faults: Violations, tenant: str | None, request: Any) -> Query:
    """What a QueryRequest asks, of a range that is given elsewhere: one bucket stands for it."""
    for field in ("start_time", "end_time", "step"):
        faults.require(field, not request.HasField(field), "must be absent: the window says when")
    for field in ("page_size", "page_token", "compare_to"):
        faults.require(field, not getattr(request, field), "must be absent here")
    return _read_question(faults, tenant, request, 0, BUCKET_S, BUCKET_S)


def _read_question(
    faults: Violations, tenant: str | None, request: Any, start_s: int, end_s: int, step_s: int
) -> Query:
    faults.matches("name", request.name, NAME, "must be a metric's name")
    aggregation = _AGGREGATIONS.get(request.aggregation)
    faults.require("aggregation", aggregation is not None, "is missing or not known")
    quantiles = tuple(request.quantiles)
    wants_quantiles = aggregation is Aggregation.QUANTILES
    if wants_quantiles:
        faults.count("quantiles", len(quantiles), at_least=1, at_most=_MAX_QUANTILES)
    faults.require("quantiles", all(0 <= q <= 1 for q in quantiles), "must be from 0 to 1")
    faults.require("bound", abs(request.bound) < float("inf"), "must be finite")
    for index, label in enumerate(request.group_by):
        faults.matches(f"group_by[{index}]", label, LABEL, "must be a label's name")
    faults.count("group_by", len(request.group_by), at_least=0, at_most=_MAX_LABELS)
    both = request.by_series and len(request.group_by) > 0
    faults.require("by_series", not both, "and group_by exclude each other")
    return Query(
        tenant=tenant,
        name=request.name,
        matchers=read_matchers(faults, request.matchers),
        start_s=start_s,
        end_s=end_s,
        step_s=step_s,
        aggregation=aggregation or Aggregation.COUNT,
        quantiles=quantiles if wants_quantiles else (),
        bound=request.bound,
        group_by=tuple(dict.fromkeys(request.group_by)),
        by_series=request.by_series,
        top_k=request.top_k,
        offsets_s=_read_offsets(faults, request, step_s if request.HasField("step") else BUCKET_S),
    )


def _read_range(faults: Violations, request: Any, now_s: float) -> tuple[int, int, int]:
    """Start, end and step, widened to whole steps or buckets."""
    step_s = 0
    if request.HasField("step"):
        wanted_s = seconds_of(request.step)
        step_s = int(wanted_s)
        if step_s != wanted_s or step_s <= 0 or step_s % BUCKET_S:
            faults.add("step", f"must be a positive multiple of {BUCKET_S} s, is {wanted_s:g} s")
            step_s = 0
    end_s = _time("end_time", request, faults) if request.HasField("end_time") else now_s
    start_s = end_s - _HOUR_S
    if request.HasField("start_time"):
        start_s = _time("start_time", request, faults)
    if start_s == end_s:
        start_s = end_s - (step_s or _INSTANT_S)
        step_s = 0
    faults.require("start_time", start_s < end_s, "must not be after end_time")
    if not step_s or (request.HasField("start_time") and end_s - start_s <= step_s):
        first_s, last_s = _widened(start_s, end_s, BUCKET_S)
        return first_s, last_s, max(last_s - first_s, BUCKET_S)
    first_s, last_s = _widened(start_s, end_s, step_s)
    steps = (last_s - first_s) // step_s
    shortest_s = -(-(last_s - first_s) // _MAX_STEPS // BUCKET_S) * BUCKET_S
    text = f"gives {steps:,} points, at most are {_MAX_STEPS:,}: at least {shortest_s:,} s would do"
    faults.require("step", steps <= _MAX_STEPS, text)
    return first_s, last_s, step_s


def _widened(start_s: float, end_s: float, length_s: int) -> tuple[int, int]:
    return int(start_s // length_s) * length_s, int(-(-end_s // length_s)) * length_s


def _time(field: str, request: Any, faults: Violations) -> float:
    given: Timestamp = getattr(request, field)
    faults.require(field, 0 <= given.seconds < _LATEST_S, "must be from 1970 to 2242")
    return given.seconds + given.nanos / 1e9


def _read_offsets(faults: Violations, request: Any, step_s: int) -> tuple[int, ...]:
    offsets = []
    faults.count("compare_to", len(request.compare_to), at_least=0, at_most=_MAX_OFFSETS)
    for index, duration in enumerate(request.compare_to):
        offset_s = seconds_of(duration)
        fits = offset_s > 0 and offset_s % (step_s or BUCKET_S) == 0
        faults.require(
            f"compare_to[{index}]", fits, f"must be a positive multiple of {step_s or BUCKET_S} s"
        )
        offsets.append(int(offset_s))
    faults.require("compare_to", len(set(offsets)) == len(offsets), "must differ")
    return tuple(offsets)


def _told(error: Exception) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
