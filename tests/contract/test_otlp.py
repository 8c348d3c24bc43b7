"""OTLP as the real OpenTelemetry SDK speaks it, and as strangers may."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import Observation
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as collector
from opentelemetry.proto.metrics.v1 import metrics_pb2 as otlp
from opentelemetry.sdk.metrics import (
    Counter,
    Histogram,
    MeterProvider,
    ObservableCounter,
)
from opentelemetry.sdk.metrics.export import AggregationTemporality, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import (
    ExponentialBucketHistogramAggregation,
    View,
)
from opentelemetry.sdk.resources import Resource
from support.servers import running

from agent360.client import Mesh
from agent360.mesh.runtime.server import Server
from agent360.metrics.v1 import metrics_pb2 as pb

METHOD = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
CUMULATIVE = otlp.AGGREGATION_TEMPORALITY_CUMULATIVE
DELTA = otlp.AGGREGATION_TEMPORALITY_DELTA


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running("metrics", store=f"sqlite:///{tmp_path}/m.db") as started:
        yield started


@pytest.fixture
async def mesh(server: Server) -> AsyncIterator[Mesh]:
    async with Mesh.connect(metrics=server.address, tenant="acme", api_key="") as connected:
        yield connected


@pytest.fixture(params=["cumulative", "delta"])
def temporality(request: pytest.FixtureRequest) -> dict[type, AggregationTemporality]:
    chosen = AggregationTemporality[request.param.upper()]
    return dict.fromkeys((Counter, ObservableCounter, Histogram), chosen)


def provider(server: Server, temporality: Any, *views: View) -> MeterProvider:
    exporter = OTLPMetricExporter(
        endpoint=f"http://{server.address}",
        insecure=True,
        headers=(("x-agent360-tenant", "acme"),),
        preferred_temporality=temporality,
    )
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=600_000)
    resource = Resource.create({"service.name": "planner", "host.name": "not-a-label"})
    return MeterProvider([reader], resource, views=views, shutdown_on_exit=False)


async def answer(
    mesh: Mesh, name: str, aggregation: pb.Aggregation, **matching: Any
) -> list[pb.Group]:
    request = pb.QueryRequest(name=name, aggregation=aggregation, by_series=True, **matching)
    # The SDK stamps points with now; the range has to end after it.
    request.end_time.FromNanoseconds(time.time_ns() + 20_000_000_000)
    return [group async for group in mesh.metrics.query(request)]


async def one(mesh: Mesh, name: str, aggregation: pb.Aggregation) -> float:
    (group,) = await answer(mesh, name, aggregation)
    (point,) = group.points
    return point.value


async def test_the_sdks_counters_gauges_and_histograms_arrive_in_both_temporalities(
    server: Server, mesh: Mesh, temporality: dict[type, AggregationTemporality]
) -> None:
    sdk = provider(server, temporality)
    meter = sdk.get_meter("tests")
    plans = meter.create_counter("agent.plans", unit="1")
    open_plans = meter.create_up_down_counter("agent.open")
    meter.create_observable_gauge("agent.depth", [lambda _: iter([Observation(7.5)])])
    seconds = meter.create_histogram("agent.plan.duration", unit="s")
    values = [0.003 * n for n in range(1, 400)]
    for part in (values[:150], values[150:]):
        for value in part:
            plans.add(2, {"kind": "trip"})
            seconds.record(value)
        open_plans.add(3)
        assert await asyncio.to_thread(sdk.force_flush)
    await asyncio.to_thread(sdk.shutdown)

    (group,) = await answer(mesh, "agent_plans", pb.AGGREGATION_SUM)
    assert dict(group.labels) == {"kind": "trip", "service_name": "planner"}
    assert sum(point.value for point in group.points) == 2 * len(values)
    assert await one(mesh, "agent_open", pb.AGGREGATION_LAST) == 6
    assert await one(mesh, "agent_depth", pb.AGGREGATION_LAST) == 7.5
    assert await one(mesh, "agent_plan_duration", pb.AGGREGATION_COUNT) == len(values)
    total = await one(mesh, "agent_plan_duration", pb.AGGREGATION_SUM)
    assert total == pytest.approx(sum(values))


async def test_exponential_histograms_arrive_with_quantiles_within_two_percent(
    server: Server, mesh: Mesh, temporality: dict[type, AggregationTemporality]
) -> None:
    view = View(
        instrument_name="latency",
        aggregation=ExponentialBucketHistogramAggregation(max_size=160),
    )
    sdk = provider(server, temporality, view)
    seconds = sdk.get_meter("tests").create_histogram("latency", unit="s")
    values = [0.05 + 0.01 * n for n in range(1, 1_000)]
    for part in (values[::7], [v for n, v in enumerate(values) if n % 7]):
        for value in part:
            seconds.record(value)
        assert await asyncio.to_thread(sdk.force_flush)
    await asyncio.to_thread(sdk.shutdown)
    (group,) = await answer(
        mesh, "latency", pb.AGGREGATION_QUANTILES, quantiles=[0.1, 0.5, 0.9, 0.99]
    )
    (point,) = group.points
    assert point.count == len(values)
    exact = [values[int(q * (len(values) - 1))] for q in (0.1, 0.5, 0.9, 0.99)]
    assert list(point.quantiles) == pytest.approx(exact, rel=0.06)
    assert await one(mesh, "latency", pb.AGGREGATION_SUM) == pytest.approx(sum(values))


# -------------------------------------------------------------------- by hand


class Exporter:
    """Sends points as a stranger would."""

    def __init__(self, server: Server) -> None:
        self._channel = grpc.aio.insecure_channel(server.address)
        self._export: Any = self._channel.unary_unary(
            METHOD,
            request_serializer=collector.ExportMetricsServiceRequest.SerializeToString,
            response_deserializer=collector.ExportMetricsServiceResponse.FromString,
        )
        self.began_ns = time.time_ns()

    async def send(self, *metrics: otlp.Metric, tenant: str = "acme") -> Any:
        request = collector.ExportMetricsServiceRequest()
        request.resource_metrics.add().scope_metrics.add().metrics.extend(metrics)
        return await self._export(request, metadata=(("x-agent360-tenant", tenant),))

    def total(self, value: float, at_s: float, began_s: float = 0.0) -> otlp.Metric:
        """A cumulative sum at a time after the exporter began."""
        metric = otlp.Metric(name="plans")
        metric.sum.is_monotonic = True
        metric.sum.aggregation_temporality = CUMULATIVE
        point = metric.sum.data_points.add(as_double=value)
        point.start_time_unix_nano = self.began_ns + int(began_s * 1e9)
        point.time_unix_nano = self.began_ns + int(at_s * 1e9)
        return metric

    async def close(self) -> None:
        await self._channel.close()


@pytest.fixture
async def exporter(server: Server) -> AsyncIterator[Exporter]:
    made = Exporter(server)
    yield made
    await made.close()


async def test_resets_repetitions_and_a_restart_of_the_service_change_no_sum(
    tmp_path: Path,
) -> None:
    store = f"sqlite:///{tmp_path}/m.db"
    async with running("metrics", store=store) as server:
        exporter = Exporter(server)
        await exporter.send(exporter.total(10, 1))
        await exporter.send(exporter.total(15, 2))
        await exporter.send(exporter.total(15, 2))  # its answer was lost
        await exporter.send(exporter.total(12, 1.5))  # overtaken
        await exporter.send(exporter.total(4, 3))  # less without a new start: a reset
        await exporter.send(exporter.total(7, 5, began_s=4))  # a reset that says so
        late = await exporter.send(exporter.total(99, 6, began_s=0))  # from before it
        assert late.partial_success.rejected_data_points == 1
        assert "restart" in late.partial_success.error_message
        await exporter.close()
    async with (
        running("metrics", store=store) as server,
        Mesh.connect(metrics=server.address, tenant="acme", api_key="") as mesh,
    ):
        began_ns = exporter.began_ns
        exporter = Exporter(server)
        exporter.began_ns = began_ns
        await exporter.send(exporter.total(9, 7, began_s=4))
        await exporter.close()
        assert await one(mesh, "plans", pb.AGGREGATION_SUM) == 15 + 4 + 7 + 2


async def test_a_series_that_began_before_the_service_counts_from_its_first_point_on(
    exporter: Exporter, mesh: Mesh
) -> None:
    exporter.began_ns -= 3_600_000_000_000
    await exporter.send(exporter.total(1_000, 3_599))
    await exporter.send(exporter.total(1_003, 3_600))
    assert await one(mesh, "plans", pb.AGGREGATION_SUM) == 3


async def test_what_is_not_taken_is_named_and_counted_and_the_rest_is_taken(
    exporter: Exporter, mesh: Mesh, server: Server
) -> None:
    now_ns = time.time_ns()
    summary = otlp.Metric(name="old.summary")
    summary.summary.data_points.add(time_unix_nano=now_ns)
    summary.summary.data_points.add(time_unix_nano=now_ns)
    swings = otlp.Metric(name="swings")
    swings.sum.aggregation_temporality = DELTA
    swings.sum.data_points.add(as_int=1, time_unix_nano=now_ns)
    ancient = otlp.Metric(name="ancient")
    ancient.gauge.data_points.add(as_int=1, time_unix_nano=1)
    bad = otlp.Metric(name="bad")
    bad.gauge.data_points.add(as_double=float("nan"), time_unix_nano=now_ns)
    good = otlp.Metric(name="good")
    good.gauge.data_points.add(as_int=4, time_unix_nano=now_ns)
    response = await exporter.send(summary, swings, ancient, bad, good)
    told = response.partial_success
    assert told.rejected_data_points == 5
    for text in ("old_summary: summaries", "(2)", "swings: ", "ancient: is older", "bad: nan"):
        assert text in told.error_message
    assert await one(mesh, "good", pb.AGGREGATION_LAST) == 4
    accepted = await exporter.send(good)
    assert not accepted.HasField("partial_success")


async def test_series_beyond_the_bound_are_refused_by_name_and_counted_for_their_tenant(
    tmp_path: Path,
) -> None:
    async with running(
        "metrics", store=f"sqlite:///{tmp_path}/m.db", max_series_per_tenant=2
    ) as server:
        exporter = Exporter(server)
        metrics = [otlp.Metric(name=f"depth_{n}") for n in range(5)]
        for metric in metrics:
            metric.gauge.data_points.add(as_int=1, time_unix_nano=time.time_ns())
        told = (await exporter.send(*metrics)).partial_success
        await exporter.close()
        assert told.rejected_data_points == 3
        assert "depth_2: tenant acme has 2 series" in told.error_message
        counted = server.registry.get_sample_value(
            "metrics_rejected_samples_total", {"reason": "cardinality"}
        )
        assert counted == 3


async def test_the_tenant_is_that_of_the_metadata_and_no_other_sees_its_series(
    exporter: Exporter, mesh: Mesh
) -> None:
    await exporter.send(exporter.total(10, 1), tenant="globex")
    assert await answer(mesh, "plans", pb.AGGREGATION_SUM) == []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exporter.send(exporter.total(10, 1), tenant="Not A Tenant")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_overloaded_service_says_when_to_try_again(tmp_path: Path) -> None:
    async with running(
        "metrics", store=f"sqlite:///{tmp_path}/m.db", intake={"max_waiting_bytes": 1}
    ) as server:
        exporter = Exporter(server)
        # What comes while the first is on its way to the disk is too much.
        outcomes = await asyncio.gather(
            *(exporter.send(exporter.total(number, number)) for number in range(1, 30)),
            return_exceptions=True,
        )
        await exporter.close()
    errors = [each for each in outcomes if isinstance(each, grpc.aio.AioRpcError)]
    assert errors
    assert {error.code() for error in errors} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    trailing = dict(errors[0].trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])  # type: ignore[arg-type]
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToNanoseconds() > 0
