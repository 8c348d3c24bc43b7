"""Between log messages and values of the domain; requests are checked here."""

from __future__ import annotations

import re
import time
import uuid
from typing import Any, Final

import grpc

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.metrics.ports import LogFilter, LogRecord
from agent360.mesh.runtime.call import Call
from agent360.mesh.runtime.redaction import Redactor
from agent360.mesh.runtime.validation import TENANT_PATTERN, TENANT_RULE, Violations

MAX_RECORDS: Final = 1_000
"""Records in one message."""

_TRACE: Final = re.compile(r"([0-9a-f]{32})?")
_LEVELS: Final = frozenset(pb.LogLevel.values()) - {pb.LOG_LEVEL_UNSPECIFIED}
_EARLY_S: Final = 600.0
_CUT: Final = {"message": 4_096, "pattern": 256, "exception": 16_384}
_MAX_VALUE: Final = 1_024
_SHORT: Final = {"span_id": 16, "request_id": 256, "method": 256, "code": 64}


def read_records(call: Call, request: Any, redactor: Redactor) -> list[LogRecord]:
    """The records of a WriteRequest; what is secret is taken out.

    Raises:
        InvalidRequestError: one is malformed.
        MeshError: PERMISSION_DENIED; one is of a tenant that the caller may not speak for.
    """
    faults = Violations()
    faults.count("records", len(request.records), at_least=1, at_most=MAX_RECORDS)
    faults.raise_if_any()
    found = []
    for index, each in enumerate(request.records):
        faults.nested(f"records[{index}]", lambda inner, each=each: _check(inner, each))  # type: ignore[misc]
        tenant = each.tenant or call.tenant
        if not call.principal.may_speak_for(tenant):
            raise MeshError(
                grpc.StatusCode.PERMISSION_DENIED,
                "TENANT_NOT_ALLOWED",
                f"key {call.principal.name!r} may not speak for tenant {tenant!r}",
                metadata={"tenant": tenant},
            )
        if len(faults.found) >= _MAX_FAULTS:
            break
        if not faults.found:
            found.append(to_record(each, tenant, redactor))
    faults.raise_if_any()
    return found


_MAX_FAULTS: Final = 20
_LONGEST_S: Final = 366 * 86_400


def _check(faults: Violations, record: Any) -> None:
    faults.require("level", record.level in _LEVELS, "is missing or not known")
    faults.text("service", record.service, max_bytes=64)
    faults.text("message", record.message, max_bytes=2**20)
    faults.matches("trace_id", record.trace_id, _TRACE, "must be 32 hexadecimal digits")
    if record.tenant:
        faults.matches("tenant", record.tenant, TENANT_PATTERN, TENANT_RULE)
    for field, size in _SHORT.items():
        faults.text(field, getattr(record, field), max_bytes=size, min_bytes=0)
    faults.count("attributes", len(record.attributes), at_least=0, at_most=32)
    for key in record.attributes:
        faults.text(f"attributes[{key[:64]}]", key, max_bytes=64)
    if faults.time("record_time", record.record_time):
        early = record.record_time.ToNanoseconds() / 1e9 > time.time() + _EARLY_S
        faults.require("record_time", not early, f"is more than {_EARLY_S:g} s in the future")
    lasts = 0 <= record.duration.seconds <= _LONGEST_S and 0 <= record.duration.nanos < 10**9
    faults.require("duration", lasts, "must not be negative, nor longer than a year")
    if record.record_id:
        try:
            uuid.UUID(record.record_id)
        except ValueError:
            faults.add("record_id", "must be a UUID")


def to_record(record: pb.LogRecord, tenant: str, redactor: Redactor) -> LogRecord:
    """A checked record as a domain value: filled in, cut to size, without secrets."""
    kept = pb.LogRecord()
    kept.CopyFrom(record)
    kept.tenant = tenant
    kept.record_id = str(uuid.UUID(kept.record_id)) if kept.record_id else str(uuid.uuid4())
    if not kept.HasField("record_time"):
        kept.record_time.FromNanoseconds(time.time_ns())
    kept.pattern = kept.pattern or kept.message
    for field, size in _CUT.items():
        setattr(kept, field, _cut(redactor.text(getattr(kept, field)), size))
    attributes = {
        key: _cut(redactor.named(key, value), _MAX_VALUE) for key, value in kept.attributes.items()
    }
    kept.attributes.update(attributes)
    return LogRecord(
        tenant,
        kept.record_id,
        kept.record_time.ToMicroseconds(),
        int(kept.level),
        kept.service,
        kept.pattern,
        kept.trace_id,
        kept.SerializeToString(deterministic=True),
    )


def record_message(record: LogRecord, *, whole: bool) -> pb.LogRecord:
    """A stored record; unless ``whole`` without what shows the inside of a service."""
    message = pb.LogRecord.FromString(record.body)
    if not whole:
        message.ClearField("exception")
        message.attributes.pop("peer", None)
    return message


def read_filter(call: Call, request: Any) -> LogFilter:
    """The filter of a ListRecordsRequest.

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
    return LogFilter(
        None if call.all_tenants else call.tenant,
        start_us,
        end_us,
        int(wanted.level),
        wanted.service,
        wanted.pattern,
        wanted.trace_id,
    )


def _cut(text: str, size: int) -> str:
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return text
    return encoded[: size - 3].decode(errors="ignore") + "..."
