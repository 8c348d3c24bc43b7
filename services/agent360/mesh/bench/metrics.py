"""``bench metrics``: taking samples in, asking about a day of them, and what both cost."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from rich.console import Console

from agent360.client import Mesh
from agent360.client.channel import open_channel
from agent360.mesh.bench.bare import CHECK, BareClient
from agent360.mesh.bench.processes import PROCESSES, bare_server, cpu_seconds, resident_bytes
from agent360.mesh.bench.timing import MESSAGE_ITEMS, Series, run_many
from agent360.mesh.cli.supervisor import Supervisor
from agent360.mesh.free_ports import free_ports
from agent360.metrics.v1 import metrics_pb2 as pb

QUERIED_SERIES: Final = 100
"""Series that are asked about."""
DAY_S: Final = 86_400
"""How much of them."""
IDLE_SERIES: Final = 20_000
"""Series that are told once, to see what they take."""

_TENANT: Final = "bench"
_REPORT: Final = "/agent360.metrics.v1.MetricsService/Report"
_REPORTED_SERIES: Final = 200
_AHEAD: Final = 64
_CALLS_AT_ONCE: Final = 50_000
_QUERIES: Final = 150
_WARM_UP: Final = 3
_MINUTE_S: Final = 60
_OBSERVATIONS: Final = 5
_QUERY_S: Final = 60.0


@dataclass(slots=True)
class MetricsFigures:
    """What was measured."""

    reported: Series = field(default_factory=Series)
    """Samples a second into rollups."""
    bare: Series = field(default_factory=Series)
    """Items a second of a bare stream."""
    report_cpu_s: float = 0.0
    """The service's CPU time for the samples of all rounds."""
    report_count: int = 0
    """How many samples that were."""
    caller_us: list[float] = field(default_factory=list)
    """What reporting an observation costs the caller, its sending included, by round."""
    mean_ms: list[float] = field(default_factory=list)
    """Latencies of queries of means and rates over a day."""
    quantile_ms: list[float] = field(default_factory=list)
    """Latencies of queries of quantiles of all series merged over a day."""
    series_bytes: float = 0.0
    """Memory of an idle series."""


async def measure(rounds: int, seconds: float, report: Callable[[str], None]) -> MetricsFigures:
    """Measures all kinds.

    Args:
        rounds: how often every measurement is taken; the kinds take turns within a round.
        seconds: about how long one measurement takes.
        report: told of progress.
    """
    figures = MetricsFigures()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bare_port, port = free_ports(2)
        await stack.enter_async_context(bare_server(bare_port))
        bare = BareClient(CHECK, f"127.0.0.1:{bare_port}")
        stack.push_async_callback(bare.close)
        service = await stack.enter_async_context(
            Supervisor(
                {
                    "metrics": [
                        f"--set=store=sqlite:///{directory / 'metrics.db'}",
                        f"--set=max_series_per_tenant={2 * IDLE_SERIES}",
                    ]
                },
                {"metrics": port},
                log_file=directory / "metrics.log",
            )
        )
        address, pid = service.addresses["metrics"], service.pids["metrics"]
        channel = await stack.enter_async_context(open_channel(address))
        mesh = await stack.enter_async_context(
            Mesh.connect(metrics=address, tenant=_TENANT, api_key="")
        )
        # First: memory that queries gave back would hide what a series takes.
        report("metrics: idle series")
        if PROCESSES.is_dir():
            figures.series_bytes = await _bytes_of_a_series(channel, pid)
        stream = _ReportStream(channel, "bench-load", _latencies(MESSAGE_ITEMS))
        for number in range(rounds + 1):
            report(f"metrics: round {number} of {rounds}" if number else "metrics: warming up")
            length = seconds if number else seconds / 4
            series = figures.reported if number else Series()
            before_s, before = _cpu_s(pid), stream.sent
            await run_many(stream.send, length, series)
            if number:
                figures.report_cpu_s += _cpu_s(pid) - before_s
                figures.report_count += stream.sent - before
            await run_many(
                lambda count: bare.many(count, MESSAGE_ITEMS),
                length,
                figures.bare if number else Series(),
            )
            if number:
                figures.caller_us.append(await _caller_us(mesh))
        await stream.close()
        report("metrics: a day of samples")
        await _fill_a_day(channel)
        await _ask(mesh, figures)
    return figures


def flatten(figures: MetricsFigures) -> dict[str, float]:
    """The figures that are promised, by name."""
    flat = {
        "report_per_s": figures.reported.median_per_s,
        "report_ratio": figures.reported.median_per_s / figures.bare.median_per_s,
        "mean_p99_ms": _p99(figures.mean_ms),
        "quantile_p99_ms": _p99(figures.quantile_ms),
        "caller_us": statistics.median(figures.caller_us),
    }
    if figures.series_bytes:
        flat["series_bytes"] = figures.series_bytes
    return {name: round(value, 3) for name, value in flat.items()}


def print_metrics_figures(
    figures: MetricsFigures, flat: dict[str, float], console: Console
) -> None:
    """Prints the rates, the latencies and the costs."""
    if figures.report_cpu_s:
        per_core = figures.report_count / figures.report_cpu_s
        console.print(f"samples for a second of the service's CPU time: {per_core:,.0f}")
    console.print(
        f"a day of {QUERIED_SERIES} series, p50: means and rates "
        f"{statistics.median(figures.mean_ms):.1f} ms, quantiles "
        f"{statistics.median(figures.quantile_ms):.1f} ms"
    )
    for name, value in flat.items():
        console.print(f"{name} = {value:,.3f}")


class _ReportStream:
    """Sends the same samples again and again, as fast as they are acknowledged."""

    def __init__(
        self, channel: grpc.aio.Channel, reporter_id: str, values: Sequence[float]
    ) -> None:
        self._call: Any = channel.stream_stream(
            _REPORT,
            request_serializer=pb.ReportRequest.SerializeToString,
            response_deserializer=pb.ReportResponse.FromString,
        )(metadata=(("x-agent360-tenant", _TENANT),))
        self._reporter_id = reporter_id
        self._values = values
        self._sequence = 0
        self._acknowledged = 0
        self.sent = 0
        """Samples so far."""

    async def send(self, count: int) -> None:
        """Sends so many samples; returns when all are acknowledged."""
        for _ in range(count // len(self._values)):
            self._sequence += 1
            message = pb.ReportRequest(
                reporter_id=self._reporter_id,
                sequence=self._sequence,
                refs=[number % _REPORTED_SERIES for number in range(len(self._values))],
                values=self._values,
            )
            if self._sequence == 1:
                message.definitions.extend(
                    _definition(ref, "bench_load_seconds", {"series": str(ref)})
                    for ref in range(_REPORTED_SERIES)
                )
            await self._call.write(message)
            while self._sequence - self._acknowledged > _AHEAD:
                await self._read()
        while self._acknowledged < self._sequence:
            await self._read()
        self.sent += count

    async def close(self) -> None:
        """Ends the stream."""
        await _finish(self._call)

    async def _read(self) -> None:
        response = await self._call.read()
        if response.rejections:
            raise RuntimeError(f"samples were refused: {response.rejections[0]}")
        self._acknowledged = max(self._acknowledged, response.acknowledged)


def _definition(ref: int, name: str, labels: dict[str, str]) -> pb.SeriesDefinition:
    return pb.SeriesDefinition(
        ref=ref,
        series=pb.Series(name=name, labels=labels, kind=pb.SERIES_KIND_DISTRIBUTION, unit="s"),
    )


def _latencies(count: int) -> list[float]:
    chance = random.Random(1)
    return [chance.lognormvariate(-4.0, 1.0) for _ in range(count)]


async def _caller_us(mesh: Mesh) -> float:
    """CPU time of reporting one observation of a service, in microseconds."""
    values = _latencies(_CALLS_AT_ONCE)
    observe = mesh.metrics.observe
    labels = {"method": "Get", "code": "OK"}
    before = time.process_time()
    for value in values:
        observe("bench_caller_seconds", value, labels, unit="s")
    await mesh.metrics.flush()
    return (time.process_time() - before) / _CALLS_AT_ONCE * 1e6


async def _fill_a_day(channel: grpc.aio.Channel) -> None:
    """Reports a day of samples: some observations a minute of each series."""
    call: Any = channel.stream_stream(
        _REPORT,
        request_serializer=pb.ReportRequest.SerializeToString,
        response_deserializer=pb.ReportResponse.FromString,
    )(metadata=(("x-agent360-tenant", _TENANT),))
    start = _day_start()
    values = itertools.cycle(_latencies(100_000))
    minutes = DAY_S // _MINUTE_S
    for sequence, first in enumerate(range(0, minutes, 10), start=1):
        message = pb.ReportRequest(reporter_id="bench-day", sequence=sequence)
        message.base_time.FromSeconds(start)
        if sequence == 1:
            message.definitions.extend(
                _definition(ref, "bench_day_seconds", {"series": str(ref)})
                for ref in range(QUERIED_SERIES)
            )
        for minute in range(first, min(first + 10, minutes)):
            for ref in range(QUERIED_SERIES):
                for _ in range(_OBSERVATIONS):
                    message.refs.append(ref)
                    message.values.append(next(values))
                    message.offsets_ms.append(minute * _MINUTE_S * 1000)
        await call.write(message)
    await _finish(call)


async def _finish(call: Any) -> None:
    """Ends a stream of reports once all of it is acknowledged."""
    await call.done_writing()
    while (response := await call.read()) is not grpc.aio.EOF:
        if response.rejections:
            raise RuntimeError(f"samples were refused: {response.rejections[0]}")


async def _ask(mesh: Mesh, figures: MetricsFigures) -> None:
    """Asks for means and rates by series, and for quantiles of all; each query another."""
    for number in range(-_WARM_UP, _QUERIES):
        aggregation = pb.AGGREGATION_MEAN if number % 2 else pb.AGGREGATION_RATE
        request = _query(aggregation, _MINUTE_S, number)
        request.by_series = True
        elapsed_ms = await _timed(mesh, request, QUERIED_SERIES)
        if number >= 0:
            figures.mean_ms.append(elapsed_ms)
    for number in range(-_WARM_UP, _QUERIES):
        request = _query(pb.AGGREGATION_QUANTILES, 5 * _MINUTE_S, number)
        request.quantiles.extend((0.5, 0.9, 0.99))
        elapsed_ms = await _timed(mesh, request, 1)
        if number >= 0:
            figures.quantile_ms.append(elapsed_ms)


def _query(aggregation: Any, step_s: int, number: int) -> pb.QueryRequest:
    request = pb.QueryRequest(name="bench_day_seconds", aggregation=aggregation, page_size=1_000)
    request.start_time.FromSeconds(_day_start())
    request.end_time.FromSeconds(_day_start() + DAY_S)
    request.step.FromSeconds(step_s)
    # True of every series, and another condition each time: no answer is kept of it.
    request.matchers.add(
        label="series", operator=pb.MATCH_OPERATOR_NOT_EQUAL, value=f"no such series {number}"
    )
    return request


async def _timed(mesh: Mesh, request: pb.QueryRequest, expected: int) -> float:
    began = time.perf_counter()
    groups = [group async for group in mesh.metrics.query(request, timeout=_QUERY_S)]
    elapsed_ms = (time.perf_counter() - began) * 1e3
    if len(groups) != expected:
        raise RuntimeError(f"{len(groups)} groups instead of {expected}")
    return elapsed_ms


async def _bytes_of_a_series(channel: grpc.aio.Channel, pid: int) -> float:
    """What the service's memory grows by for each series that is told once."""
    before = resident_bytes(pid)
    call: Any = channel.stream_stream(
        _REPORT,
        request_serializer=pb.ReportRequest.SerializeToString,
        response_deserializer=pb.ReportResponse.FromString,
    )(metadata=(("x-agent360-tenant", _TENANT),))
    for sequence, first in enumerate(range(0, IDLE_SERIES, 500), start=1):
        refs = range(first, first + 500)
        await call.write(
            pb.ReportRequest(
                reporter_id="bench-idle",
                sequence=sequence,
                definitions=[
                    _definition(
                        ref,
                        "bench_idle_seconds",
                        {"series": str(ref), "method": "Get", "code": "OK", "service": "cache"},
                    )
                    for ref in refs
                ],
                refs=refs,
                values=[0.25] * len(refs),
            )
        )
    await _finish(call)
    return (resident_bytes(pid) - before) / IDLE_SERIES


def _day_start() -> int:
    """A day before the last full hour, so that all of it can still be reported."""
    return int(time.time()) // 3600 * 3600 - DAY_S


def _cpu_s(pid: int) -> float:
    return cpu_seconds(pid) if PROCESSES.is_dir() else 0.0


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
