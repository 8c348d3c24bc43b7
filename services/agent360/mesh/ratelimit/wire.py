"""Wire messages to domain values and back."""

from __future__ import annotations

import re
from datetime import UTC
from typing import Any, Final

from agent360.mesh.ratelimit.decisions import Decision, Usage
from agent360.mesh.ratelimit.limits import Algorithm, FailureMode, Limit, Source
from agent360.mesh.ratelimit.limits_file import calendar_of, faults_of
from agent360.mesh.ratelimit.windows import Calendar
from agent360.mesh.runtime.validation import Violations, seconds_of, set_duration
from agent360.ratelimit.v1 import ratelimit_pb2 as pb

MAX_FACTS: Final = 16
MAX_SLOTS: Final = 1_000

_FACT_NAME: Final = re.compile(r"[a-z0-9_.-]{1,64}")

_ALGORITHMS: Final = {
    Algorithm.TOKEN_BUCKET: pb.ALGORITHM_TOKEN_BUCKET,
    Algorithm.SLIDING_WINDOW: pb.ALGORITHM_SLIDING_WINDOW,
    Algorithm.FIXED_WINDOW: pb.ALGORITHM_FIXED_WINDOW,
    Algorithm.CONCURRENCY: pb.ALGORITHM_CONCURRENCY,
}
_ALGORITHM_OF: Final = {wire: algorithm for algorithm, wire in _ALGORITHMS.items()}
_FAILURE_MODES: Final = {
    FailureMode.OPEN: pb.FAILURE_MODE_OPEN,
    FailureMode.CLOSED: pb.FAILURE_MODE_CLOSED,
}
_SOURCES: Final = {Source.FILE: pb.LIMIT_SOURCE_FILE, Source.API: pb.LIMIT_SOURCE_API}
_CALENDARS: Final = {
    Calendar.HOUR: pb.CALENDAR_PERIOD_HOUR,
    Calendar.DAY: pb.CALENDAR_PERIOD_DAY,
    Calendar.WEEK: pb.CALENDAR_PERIOD_WEEK,
    Calendar.MONTH: pb.CALENDAR_PERIOD_MONTH,
    Calendar.YEAR: pb.CALENDAR_PERIOD_YEAR,
}
_CALENDAR_OF: Final = {wire: calendar for calendar, wire in _CALENDARS.items()}


def read_request(request: Any, faults: Violations) -> dict[str, str]:
    """Checks name and descriptor, and returns the latter."""
    faults.text("name", request.name, max_bytes=128)
    facts = dict(request.descriptor)
    check_facts("descriptor", facts, faults)
    return facts


def check_facts(field: str, facts: dict[str, str], faults: Violations) -> None:
    """Checks the facts of a request."""
    faults.count(field, len(facts), at_least=0, at_most=MAX_FACTS)
    for key, value in facts.items():
        faults.matches(f"{field}[{key[:64]}]", key, _FACT_NAME, "keys match [a-z0-9_.-]{1,64}")
        faults.text(f"{field}[{key[:64]}]", value, max_bytes=256, min_bytes=0)
    for reserved in ("tenant", "plan"):
        faults.require(f"{field}[{reserved}]", reserved not in facts, "is set by the service")


def write_decision(message: Any, decision: Decision) -> None:
    """Fills a wire Decision in place."""
    allowed, granted, remaining, limit, reset_after_s, retry_after_s, limit_id, degraded = decision
    if allowed:
        message.allowed = True
    message.granted = granted
    message.remaining = remaining
    if limit_id:
        message.limit = limit
        message.limit_id = limit_id
        if reset_after_s > 0:
            reset = message.reset_after
            whole = int(reset_after_s)
            if whole:
                reset.seconds = whole
            reset.nanos = int((reset_after_s - whole) * 1e9)
    if retry_after_s is not None:
        set_duration(message.retry_after, retry_after_s + 1e-6)
    if degraded:
        message.degraded = True


def limit_message(limit: Limit) -> Any:
    """A limit for the wire."""
    message = pb.Limit(
        limit_id=limit.limit_id,
        name=limit.name,
        match=dict(limit.match),
        per=limit.per,
        algorithm=_ALGORITHMS[limit.algorithm],
        amount=limit.amount,
        burst=limit.size if limit.algorithm is Algorithm.TOKEN_BUCKET else 0,
        time_zone=limit.time_zone,
        failure_mode=_FAILURE_MODES[limit.failure_mode],
        shadow=limit.shadow,
        strict=limit.strict,
        tenant=limit.tenant,
        source=_SOURCES[limit.source],
        plan=limit.plan,
        group=limit.group,
    )
    if limit.calendar is not None:
        message.calendar_period = _CALENDARS[limit.calendar]
    elif limit.algorithm is not Algorithm.CONCURRENCY:
        set_duration(message.period, limit.period_s)
    if limit.updated is not None:
        message.update_time.FromDatetime(limit.updated.astimezone(UTC).replace(tzinfo=None))
    return message


def read_limit(message: Any, faults: Violations) -> Limit:
    """A limit from the wire; what is wrong with it is noted."""
    algorithm = _ALGORITHM_OF.get(message.algorithm)
    faults.require("algorithm", algorithm is not None, "must be given")
    calendar = _CALENDAR_OF.get(message.calendar_period)
    period_s = seconds_of(message.period)
    if calendar is not None:
        faults.require("period", not message.HasField("period"), "calendar_period stands for it")
        period_s = calendar.length_s
    elif algorithm is Algorithm.CONCURRENCY:
        faults.require("period", not message.HasField("period"), "is not used by concurrency")
    else:
        faults.require("period", 0 < period_s < 1e10, f"must be positive, is {period_s:g}s")
        calendar = calendar_of(period_s, message.time_zone)
    faults.text("name", message.name, max_bytes=128, min_bytes=0)
    limit = Limit(
        limit_id=message.limit_id,
        amount=message.amount,
        period_s=period_s,
        name=message.name,
        match=dict(message.match),
        per=tuple(message.per),
        algorithm=algorithm or Algorithm.TOKEN_BUCKET,
        burst=message.burst,
        calendar=calendar,
        time_zone=message.time_zone,
        failure_mode=FailureMode.CLOSED
        if message.failure_mode == pb.FAILURE_MODE_CLOSED
        else FailureMode.OPEN,
        shadow=message.shadow,
        strict=message.strict,
        tenant=message.tenant,
        plan=message.plan,
        group=message.group,
    )
    for field, fault in faults_of(limit):
        faults.add(field, fault)
    return limit


def usage_message(usage: Usage) -> Any:
    """The usage of a count for the wire."""
    message = pb.Usage(
        limit_id=usage.limit_id,
        counted_by=dict(usage.counted_by),
        used=usage.used,
        remaining=usage.remaining,
        limit=usage.limit,
        denied=usage.denied,
        peak=usage.peak,
    )
    set_duration(message.reset_after, usage.reset_after_s)
    return message
