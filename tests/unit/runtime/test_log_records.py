"""Records of the process's log in the contract's form: whatever is logged, there is one."""

import json
from typing import Any

import pytest

from agent360.logs.v1 import logs_pb2 as pb
from agent360.mesh.runtime.logs.report import to_message


def test_what_a_record_has_a_field_for_is_in_it_and_the_rest_are_attributes() -> None:
    event = {
        "event": "call",
        "level": "warning",
        "timestamp": "2026-01-02T03:04:05.000006Z",
        "service": "cache",
        "tenant": "acme",
        "method": "/agent360.cache.v1.CacheService/Get",
        "code": "UNAVAILABLE",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": "b7ad6b7169203331",
        "request_id": "r-1",
        "duration_ms": 1.5,
        "suppressed": 7,
        "peer": "ipv4:127.0.0.1:1",
        "count": 3,
        "exception": [{"exc_type": "ValueError"}],
    }
    record = to_message(event, 30, "call UNAVAILABLE")
    assert record.level == pb.LOG_LEVEL_WARNING
    assert record.record_time.ToJsonString() == "2026-01-02T03:04:05.000006Z"
    assert record.duration.ToMicroseconds() == 1_500
    assert (record.service, record.tenant, record.code) == ("cache", "acme", "UNAVAILABLE")
    assert (record.request_id, record.suppressed) == ("r-1", 7)
    assert (record.trace_id, record.span_id) == (event["trace_id"], event["span_id"])
    assert dict(record.attributes) == {"peer": "ipv4:127.0.0.1:1", "count": "3"}
    assert json.loads(record.exception) == event["exception"]
    assert record.pattern == "call UNAVAILABLE"


@pytest.mark.parametrize(
    "odd",
    [
        {"timestamp": "soon"},
        {"timestamp": 5},
        {"duration_ms": "long"},
        {"duration_ms": float("nan")},
        {"duration_ms": -1e300},
        {"suppressed": "many"},
        {"tenant": "Not A Tenant"},
        {"trace_id": "x"},
        {"code": 14},
        {"event": ""},
        {"event": None},
        {"event": "\ud800"},
        {"n" * 200: object()},
        {f"field_{number}": number for number in range(100)},
    ],
    ids=lambda each: str(next(iter(each.items())))[:40],
)
def test_odd_values_make_a_record_all_the_same(odd: dict[str, Any]) -> None:
    record = to_message({"event": "e", "level": "info", **odd}, 20, "e")
    assert record.message
    assert record.HasField("record_time")
    assert record.tenant == ""
    assert record.trace_id == ""
    assert len(record.attributes) <= 32
    assert all(len(name.encode()) <= 64 for name in record.attributes)
    assert pb.LogRecord.FromString(record.SerializeToString()) == record
