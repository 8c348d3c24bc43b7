"""Malformed calls of the metrics service: each fault is named, none is an internal error."""

import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from support.servers import running

from agent360.audit.v1 import audit_pb2
from agent360.client.channel import open_channel
from agent360.logs.v1 import logs_pb2
from agent360.mesh.metrics.frame import Columns, Frame
from agent360.mesh.metrics.series import Kind, SeriesId
from agent360.mesh.runtime.server import Server
from agent360.metrics.v1 import metrics_pb2

NEVER = {"seconds": 1 << 62}
EVENT = {"actor": "ana", "action": "plans.approve", "resource": "plans/1", "outcome": 1}
RECORD = {"level": logs_pb2.LOG_LEVEL_WARNING, "service": "planner", "message": "late"}
AUDIT, LOGS = "agent360.audit.v1.AuditService", "agent360.logs.v1.LogService"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running("metrics", store=f"sqlite:///{tmp_path}/m.db") as started:
        yield started


async def answer(server: Server, method: str, request: Message, response: type[Any]) -> Any:
    """Calls without the client, which would not send such things."""
    channel: Any = open_channel(server.address)
    async with channel:
        call = channel.unary_unary(
            f"/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await call(request, metadata=(("x-agent360-tenant", "acme"),))


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        (
            f"{AUDIT}/Record",
            audit_pb2.RecordRequest(event={**EVENT, "event_time": NEVER}),
            "event.event_time",
        ),
        (
            f"{AUDIT}/ListEvents",
            audit_pb2.ListEventsRequest(filter={"start_time": NEVER}),
            "filter.start_time",
        ),
        (
            f"{LOGS}/Write",
            logs_pb2.WriteRequest(records=[{**RECORD, "record_time": NEVER}]),
            "records[0].record_time",
        ),
        (
            f"{LOGS}/Write",
            logs_pb2.WriteRequest(records=[{**RECORD, "duration": NEVER}]),
            "records[0].duration",
        ),
        (
            f"{LOGS}/ListRecords",
            logs_pb2.ListRecordsRequest(filter={"end_time": NEVER}),
            "filter.end_time",
        ),
    ],
)
async def test_times_that_no_calendar_has_are_named(
    server: Server, method: str, request_: Message, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await answer(server, method, request_, audit_pb2.RecordResponse)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.value.details() or "").startswith(f"{field}: must ")


@pytest.mark.parametrize("position", [5, {}, [1], ["a", "b"], [1 << 70, "b"], [1, 2], [None, "b"]])
async def test_a_page_token_that_was_tampered_with_is_refused(
    server: Server, position: object
) -> None:
    for _ in range(3):
        record = audit_pb2.RecordRequest(event=EVENT)
        await answer(server, f"{AUDIT}/Record", record, audit_pb2.RecordResponse)
    now = int(time.time())
    written = logs_pb2.WriteRequest(records=[{**RECORD, "record_time": {"seconds": now}}] * 3)
    await answer(server, f"{LOGS}/Write", written, logs_pb2.WriteResponse)
    for method, request, response in (
        (
            f"{AUDIT}/ListEvents",
            audit_pb2.ListEventsRequest(page_size=1),
            audit_pb2.ListEventsResponse,
        ),
        (
            f"{LOGS}/ListRecords",
            logs_pb2.ListRecordsRequest(page_size=1),
            logs_pb2.ListRecordsResponse,
        ),
    ):
        page = await answer(server, method, request, response)
        token = page.next_page_token
        owner = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))[0]
        forged = base64.urlsafe_b64encode(json.dumps([owner, position]).encode())
        request.page_token = forged.decode().rstrip("=")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await answer(server, method, request, response)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "page_token" in (refused.value.details() or "")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "data",
    [
        {"histogram": {"explicit_bounds": [1, NAN], "bucket_counts": [1, 2, 3], "sum": 3}},
        {"histogram": {"explicit_bounds": [1], "bucket_counts": [1, 2], "sum": INF}},
        {"histogram": {"explicit_bounds": [1], "bucket_counts": [1, 2], "sum": 3, "max": NAN}},
        {"histogram": {"explicit_bounds": [1], "bucket_counts": [1 << 63, 1 << 63], "sum": 3}},
        {"histogram": {"explicit_bounds": [-1.7e308, 1.7e308], "bucket_counts": [0, 2, 0]}},
    ],
)
async def test_a_histogram_without_values_is_refused_and_spoils_no_query(
    server: Server, data: dict[str, Any]
) -> None:
    point = {"time_unix_nano": time.time_ns(), "count": 3, **data["histogram"]}
    histogram = {"aggregation_temporality": 1, "data_points": [point]}
    metrics = [{"name": "seconds", "histogram": histogram}]
    export = metrics_service_pb2.ExportMetricsServiceRequest(
        resource_metrics=[{"scope_metrics": [{"metrics": metrics}]}]
    )
    told = await answer(
        server,
        "opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
        export,
        metrics_service_pb2.ExportMetricsServiceResponse,
    )
    assert told.partial_success.rejected_data_points == 1
    assert told.partial_success.error_message.startswith("seconds: its ")
    query = metrics_pb2.QueryRequest(name="seconds", aggregation=metrics_pb2.AGGREGATION_COUNT)
    method = "agent360.metrics.v1.MetricsService/Query"
    found = await answer(server, method, query, metrics_pb2.QueryResponse)
    assert not found.groups


def test_a_value_that_is_no_number_does_not_make_others_unreadable() -> None:
    series = [SeriesId("acme", "seconds", (), Kind.DISTRIBUTION, "s")]
    size = 3
    columns = Columns(
        np.zeros(size, np.int64),
        np.full(size, 1e9),
        np.array([1.0, NAN, INF]),
        np.ones(size, np.int64),
    )
    frame = Frame.of_samples(series, columns, np.full(size, Kind.DISTRIBUTION, np.uint8))
    merged = Frame.merged([frame, frame])
    assert merged.count.tolist() == [2]
    assert merged.total.tolist() == [2.0]
    assert merged.quantiles([0.5])[0, 0] == 1.0
