"""The Report stream as a stranger speaks it, and the client's reporter behind its surface."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.polling import eventually
from support.servers import running

from agent360.client import Mesh, reporter
from agent360.mesh.runtime.server import Server
from agent360.metrics.v1 import metrics_pb2 as pb

COUNTER, GAUGE = pb.SERIES_KIND_COUNTER, pb.SERIES_KIND_GAUGE
DISTRIBUTION = pb.SERIES_KIND_DISTRIBUTION


class Stream:
    """One Report stream."""

    def __init__(self, address: str, tenant: str = "acme") -> None:
        self._channel = grpc.aio.insecure_channel(address)
        rpc: Any = self._channel.stream_stream(
            "/agent360.metrics.v1.MetricsService/Report",
            request_serializer=pb.ReportRequest.SerializeToString,
            response_deserializer=pb.ReportResponse.FromString,
        )
        self._call = rpc(metadata=(("x-agent360-tenant", tenant),))

    async def send(self, sequence: int, **fields: Any) -> None:
        fields = {"reporter_id": "r", "refs": [1], "values": [1.0], **fields}
        await self._call.write(pb.ReportRequest(sequence=sequence, **fields))

    async def acknowledged(self, sequence: int) -> list[pb.ReportResponse]:
        """Reads until a message is acknowledged."""
        read: list[pb.ReportResponse] = []
        async with asyncio.timeout(10):
            while not read or read[-1].acknowledged < sequence:
                response = await self._call.read()
                assert response is not grpc.aio.EOF
                read.append(response)
        return read

    async def failure(self) -> grpc.aio.AioRpcError:
        async with asyncio.timeout(10):
            try:
                while await self._call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                return error
        raise AssertionError("the stream ended without an error")

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


def plans(ref: int = 1, kind: Any = COUNTER, **fields: Any) -> pb.SeriesDefinition:
    tenant = fields.pop("tenant", "")
    series = pb.Series(**{"name": "plans", "kind": kind, "unit": "1", **fields})
    return pb.SeriesDefinition(ref=ref, series=series, tenant=tenant)


@asynccontextmanager
async def stream(server: Server, tenant: str = "acme") -> AsyncIterator[Stream]:
    made = Stream(server.address, tenant)
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running("metrics", store=f"sqlite:///{tmp_path}/m.db") as started:
        yield started


async def total(server: Server, name: str = "plans", tenant: str = "acme") -> float:
    async with Mesh.connect(metrics=server.address, tenant=tenant, api_key="") as mesh:
        request = pb.QueryRequest(name=name, aggregation=pb.AGGREGATION_SUM)
        groups = [group async for group in mesh.metrics.query(request)]
        return sum(point.value for group in groups for point in group.points)


async def test_a_message_sent_again_on_any_stream_counts_once_and_is_acknowledged(
    server: Server,
) -> None:
    async with stream(server) as first, stream(server) as second:
        for sequence in (1, 2, 3):
            await first.send(sequence, definitions=[plans()])
        await first.acknowledged(3)
        for sequence in (2, 3, 4):
            await second.send(sequence, definitions=[plans()])
        await second.acknowledged(4)
        await first.send(4)
        await first.acknowledged(4)
        assert await total(server) == 4


async def test_a_gap_in_the_numbers_is_no_fault_and_reporters_are_apart(server: Server) -> None:
    async with stream(server) as first, stream(server) as second:
        await first.send(1, definitions=[plans()])
        await first.send(9)
        await second.send(1, definitions=[plans()], reporter_id="another")
        await first.acknowledged(9)
        await second.acknowledged(1)
        assert await total(server) == 3


async def test_samples_are_refused_one_by_one_by_name_and_counted(server: Server) -> None:
    now_ms = int(time.time() * 1e3)
    definitions = [
        plans(1),
        plans(2, name="no name"),
        plans(3, kind=DISTRIBUTION, name="seconds"),
        plans(4, kind=pb.SERIES_KIND_UNSPECIFIED, name="kindless"),
        plans(5, name="labelled", labels={"not a label": "x"}),
        plans(6, name="crowded", labels={f"l{n}": "x" for n in range(17)}),
        plans(7, name="stranger", tenant="Not A Tenant"),
    ]
    wrong: Sequence[tuple[int, float, int, int, str]] = [
        (1, -1.0, 0, 1, "plans: -1.0 is not a value"),
        (1, float("nan"), 0, 1, "plans: nan is not a value"),
        (2, 1.0, 0, 1, "'no name' is not a metric's name"),
        (3, 1.0, 0, 0, "seconds: has a count of 0"),
        (3, float("inf"), 0, 1, "seconds: inf is not a value"),
        (4, 1.0, 0, 1, "kindless: kind is missing"),
        (5, 1.0, 0, 1, "labelled: label 'not a label' is malformed"),
        (6, 1.0, 0, 1, "crowded: has more than 16 labels"),
        (7, 1.0, 0, 1, "stranger: tenant"),
        (99, 1.0, 0, 1, "a reference was not introduced"),
        (1, 1.0, -100 * 3_600_000, 1, "plans: is older than"),
        (1, 1.0, 3_600_000, 1, "plans: is over 600 s in the future"),
    ]
    async with stream(server) as its:
        for sequence, (ref, value, offset_ms, count, text) in enumerate(wrong, 1):
            await its.send(
                sequence,
                definitions=definitions if sequence == 1 else [],
                refs=[1, ref],
                values=[1.0, value],
                offsets_ms=[now_ms, now_ms + offset_ms],
                counts=[1, count],
                base_time={"seconds": 0},
            )
            (response,) = await its.acknowledged(sequence)
            assert response.rejected == 1
            assert text in response.rejections[0]
        assert await total(server) == len(wrong)
    page = server.registry.get_sample_value
    assert page("metrics_rejected_samples_total", {"reason": "value"}) == 4
    assert page("metrics_rejected_samples_total", {"reason": "time"}) == 2


async def test_series_beyond_the_bound_are_named_and_their_tenant_can_query_how_many(
    tmp_path: Path,
) -> None:
    async with (
        running("metrics", store=f"sqlite:///{tmp_path}/m.db", max_series_per_tenant=2) as server,
        stream(server) as its,
    ):
        definitions = [plans(n, name=f"m{n}") for n in range(1, 6)]
        await its.send(1, definitions=definitions, refs=[1, 2, 3, 4, 5], values=[1.0] * 5)
        (response,) = await its.acknowledged(1)
        assert response.rejected == 3
        assert response.rejections[0].startswith("m3: tenant acme has 2 series")
        async with asyncio.timeout(5):
            while await total(server, "mesh_rejected_samples") != 3:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"reporter_id": ""}, "reporter_id"),
        ({"values": [1.0, 2.0]}, "values"),
        ({"counts": [1, 2]}, "counts"),
        ({"definitions": [plans(1 << 20)]}, "definitions.ref"),
    ],
)
async def test_a_malformed_message_ends_the_stream_after_those_before_it_were_acknowledged(
    server: Server, fields: dict[str, Any], field: str
) -> None:
    async with stream(server) as its:
        await its.send(1, definitions=[plans()])
        await its.acknowledged(1)
        await its.send(2, **fields)
        failure = await its.failure()
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (failure.details() or "")


async def test_a_time_that_no_calendar_has_is_named(server: Server) -> None:
    async with stream(server) as report:
        await report.send(1, base_time={"seconds": 1 << 62}, definitions=[])
        error = await report.failure()
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "base_time: must be from 1970 to 9999"


async def test_refused_samples_of_a_large_message_are_one_reason_and_all_counted(
    server: Server,
) -> None:
    bad = pb.SeriesDefinition(ref=2, series=pb.Series(name="not a name", kind=GAUGE))
    good = pb.SeriesDefinition(ref=1, series=pb.Series(name="plans", kind=GAUGE))
    size = 100_000
    async with stream(server) as report:
        await report.send(
            1,
            definitions=[good, bad],
            refs=[1, 2] * (size // 2),
            values=[float("nan")] * size,
        )
        (response,) = await report.acknowledged(1)
    assert response.rejected == size
    assert len(response.rejections) == 2
    assert response.rejections[0] == "plans: nan is not a value of its kind"


async def test_a_streams_reporter_cannot_change(server: Server) -> None:
    async with stream(server) as its:
        await its.send(1, definitions=[plans()])
        await its.send(2, reporter_id="another")
        assert "reporter_id" in ((await its.failure()).details() or "")


async def test_weights_count_for_distributions_only(server: Server) -> None:
    async with stream(server) as its:
        definitions = [plans(1), plans(2, kind=DISTRIBUTION, name="seconds")]
        await its.send(1, definitions=definitions, refs=[1, 2], values=[3.0, 3.0], counts=[5, 5])
        await its.acknowledged(1)
    assert await total(server) == 3
    assert await total(server, "seconds") == 15


# -------------------------------------------------------------------- the client


async def test_the_client_drops_the_oldest_beyond_its_bound_counts_and_reports_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "MAX_BUFFERED", 1_000)
    async with running("metrics", store=f"sqlite:///{tmp_path}/m.db") as first:
        port = first.port
    async with Mesh.connect(metrics=f"127.0.0.1:{port}", tenant="acme", api_key="") as mesh:
        flushing = []
        for part in range(5):
            for number in range(400):
                mesh.metrics.observe("seconds", part * 400 + number, unit="s")
            flushing.append(asyncio.create_task(mesh.metrics.flush()))
            await asyncio.sleep(0)
        assert mesh.metrics.dropped == 1_200
        async with running("metrics", store=f"sqlite:///{tmp_path}/m.db", port=port) as server:
            await asyncio.wait_for(mesh.metrics.flush(), 30)
            await asyncio.gather(*flushing)
            assert await total(server, "mesh_dropped_samples") == 1_200
            assert await total(server, "seconds") == sum(range(1_200, 2_000))


async def test_a_sample_that_is_never_taken_does_not_hold_up_those_after_it(
    server: Server,
) -> None:
    async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh:
        mesh.metrics.count("plans", tenant="acme")
        await mesh.metrics.flush()
        mesh.metrics.count("x" * 200)
        mesh.metrics.count("plans")
        await asyncio.wait_for(mesh.metrics.flush(), 10)
        assert mesh.metrics.rejected == 1
        assert "is not a metric's name" in mesh.metrics.rejections[0]
        assert await total(server) == 2


async def nowhere() -> grpc.aio.Channel:
    raise OSError("nobody is there")


def test_two_processes_with_the_same_name_are_told_apart() -> None:
    first, second = (
        reporter.Reporter(nowhere, lambda: (), reporter_id="planner") for _ in range(2)
    )
    assert first.reporter_id.startswith("planner-")
    assert first.reporter_id != second.reporter_id


class BadOnce(reporter.Reporter):
    """Its first message is malformed, whenever it is sent."""

    def _message(self, batch: Any, refs: Any) -> Any:
        message = super()._message(batch, refs)
        if batch.sequence == 1:
            message.values.append(1.0)
        return message


async def test_a_message_that_is_refused_as_a_whole_is_given_up_and_counted(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent360.client.mesh.Reporter", BadOnce)
    async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh:
        mesh.metrics.count("plans", 5)
        first = asyncio.create_task(mesh.metrics.flush())
        await asyncio.sleep(0)
        mesh.metrics.count("plans", 7)
        await asyncio.wait_for(mesh.metrics.flush(), 20)
        await first
        assert mesh.metrics.dropped == 1
        assert await total(server) == 7
        assert await total(server, "mesh_dropped_samples") in (0, 1)


async def test_what_cannot_be_sent_fails_where_it_is_given(server: Server) -> None:
    async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh:
        wrong: Any = "fast"
        with pytest.raises(TypeError):
            mesh.metrics.observe("seconds", wrong)
        with pytest.raises(UnicodeEncodeError):
            mesh.metrics.count("plans", labels={"kind": "\ud800"})
        number: Any = 5
        mesh.metrics.count("plans", labels={"floor": number})
        await asyncio.wait_for(mesh.metrics.flush(), 10)
        assert await total(server) == 1


async def test_much_is_sent_before_its_second_is_over(server: Server) -> None:
    async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh:
        for number in range(120_000):
            mesh.metrics.observe("seconds", number, unit="s")
        await eventually(lambda: server.registry.get_sample_value("metrics_samples_total"))
        await asyncio.wait_for(mesh.metrics.flush(), 30)
        assert await total(server, "seconds") == sum(range(120_000))
        assert mesh.metrics.dropped == 0
