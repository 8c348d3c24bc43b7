"""Between audit messages and values of the domain; requests are checked here."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any, Final, NamedTuple

from agent360.audit.v1 import audit_pb2 as pb
from agent360.client.errors import InvalidRequestError, Violation
from agent360.mesh.metrics.audit.chain import day_name, day_named, day_of
from agent360.mesh.metrics.audit.verifying import Anchors, Checked, Fault
from agent360.mesh.metrics.ports import AuditEvent, ChainedEvent, ChainKey, EventFilter
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.redaction import Redactor
from agent360.mesh.runtime.validation import Violations

_ACTION: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_TRACE: Final = re.compile(r"([0-9a-f]{32})?")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_EARLY_S: Final = 600.0
_MAX_ANCHORS: Final = 10_000
_FAULTS: Final = {
    Fault.REMOVED: pb.CHAIN_FAULT_REMOVED,
    Fault.CHANGED: pb.CHAIN_FAULT_CHANGED,
    Fault.INSERTED: pb.CHAIN_FAULT_INSERTED,
    Fault.DETACHED: pb.CHAIN_FAULT_DETACHED,
}


def read_event(call: Call, request: Any, redactor: Redactor) -> AuditEvent:
    """An event to record; what the caller left out is filled in, what is secret taken out.

    Raises:
        InvalidRequestError: it is malformed.
    """
    event = pb.Event()
    event.CopyFrom(request.event)
    faults = Violations()
    faults.matches("event.action", event.action, _ACTION, f"must match {_ACTION.pattern}")
    faults.text("event.actor", event.actor, max_bytes=256, min_bytes=0)
    faults.text("event.resource", event.resource, max_bytes=512)
    faults.text("event.request_id", event.request_id, max_bytes=256, min_bytes=0)
    faults.matches("event.trace_id", event.trace_id, _TRACE, "must be 32 hexadecimal digits")
    faults.require("event.outcome", bool(event.outcome), "is missing")
    if faults.time("event.event_time", event.event_time):
        early = event.event_time.ToNanoseconds() / 1e9 > time.time() + _EARLY_S
        faults.require("event.event_time", not early, f"is more than {_EARLY_S:g} s in the future")
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
    event.ClearField("place")
    event.record_time.FromNanoseconds(time.time_ns())
    if not event.HasField("event_time"):
        event.event_time.CopyFrom(event.record_time)
    event.tenant = call.tenant
    event.actor = redactor.text(event.actor or call.principal.name)
    event.resource = redactor.text(event.resource)
    event.trace_id = event.trace_id or call.traceparent[3:35]
    event.request_id = event.request_id or call.request_id
    attributes = {key: redactor.named(key, value) for key, value in event.attributes.items()}
    event.attributes.update(attributes)
    return AuditEvent(
        call.tenant,
        event.event_id,
        event.event_time.ToMicroseconds(),
        event.actor,
        event.action,
        event.resource,
        event.SerializeToString(deterministic=True),
    )


def event_message(row: ChainedEvent) -> pb.Event:
    """A recorded event with its place."""
    event = pb.Event.FromString(row.event.body)
    event.place.day = day_name(row.chain.day)
    event.place.writer = row.chain.writer
    event.place.sequence = row.sequence
    event.place.previous_hash = row.previous.hex()
    event.place.hash = row.hash.hex()
    return event


def read_filter(tenant: str, request: Any) -> EventFilter:
    """The filter of a ListEventsRequest.

    Raises:
        InvalidRequestError: the range is empty, or a time is none.
    """
    wanted = request.filter
    faults = Violations()
    faults.time("filter.start_time", wanted.start_time)
    faults.time("filter.end_time", wanted.end_time)
    faults.raise_if_any()
    start_us = wanted.start_time.ToMicroseconds() if wanted.HasField("start_time") else None
    end_us = wanted.end_time.ToMicroseconds() if wanted.HasField("end_time") else None
    if start_us is not None and end_us is not None and start_us >= end_us:
        raise InvalidRequestError([Violation("filter.end_time", "must be after start_time")])
    return EventFilter(tenant, start_us, end_us, wanted.actor, wanted.action, wanted.resource)


class Check(NamedTuple):
    """What is to be verified."""

    tenant: str | None
    first_day: int
    last_day: int
    anchors: Anchors


def read_check(call: Call, request: Any) -> Check:
    """What a VerifyEventsRequest asks for.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    days = {"first_day": 0, "last_day": day_of(time.time()) + 1}
    for field in days:
        _read_day(faults, field, getattr(request, field), days)
    faults.require("last_day", days["first_day"] <= days["last_day"], "is before first_day")
    faults.count("anchors", len(request.anchors), at_least=0, at_most=_MAX_ANCHORS)
    anchors: Anchors = {}
    for index, anchor in enumerate(request.anchors):
        field = f"anchors[{index}]"
        day: dict[str, int] = {}
        _read_day(faults, f"{field}.day", anchor.day, day)
        faults.require(f"{field}.day", bool(anchor.day), "is missing")
        faults.matches(f"{field}.hash", anchor.hash, _HASH, "must be 64 hexadecimal digits")
        faults.require(f"{field}.sequence", anchor.sequence > 0, "must be positive")
        if not faults.found and (call.all_tenants or anchor.tenant == call.tenant):
            key = ChainKey(anchor.tenant, day[f"{field}.day"], anchor.writer)
            if days["first_day"] <= key.day <= days["last_day"]:
                anchors.setdefault(key, {})[anchor.sequence] = bytes.fromhex(anchor.hash)
    faults.raise_if_any()
    tenant = None if call.all_tenants else call.tenant
    return Check(tenant, days["first_day"], days["last_day"], anchors)


def _read_day(faults: Violations, field: str, name: str, days: dict[str, int]) -> None:
    if name:
        try:
            days[field] = day_named(name)
        except ValueError:
            faults.add(field, "must be a day as YYYY-MM-DD")


def checked_message(checked: Checked) -> pb.VerifyEventsResponse:
    """What was found of a chain."""
    message = pb.VerifyEventsResponse(
        sequence=checked.sequence, event_id=checked.event_id, description=checked.description
    )
    if checked.fault is not None:
        message.fault = _FAULTS[checked.fault]
    head = message.head
    head.tenant, head.writer = checked.chain.tenant, checked.chain.writer
    head.day = day_name(checked.chain.day)
    head.sequence, head.hash = checked.good, checked.hash.hex()
    return message
