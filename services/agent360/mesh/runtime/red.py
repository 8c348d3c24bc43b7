"""Rate, errors and duration of calls: counted by group, exposed as grpc_server_* metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final, NamedTuple

import grpc
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

_BOUNDS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
)  # fmt: skip


class RedKey(NamedTuple):
    """What calls are counted by."""

    method: str
    tenant: str
    code: grpc.StatusCode
    streamed: bool


class RedTable:
    """Counts calls and their durations; a group costs one update however many items it has.

    Prometheus sees them without tenants, by the names of the grpc-prometheus convention. The
    metrics service gets them with tenants, through ``drain``.
    """

    def __init__(self) -> None:
        self._handled: dict[tuple[str, grpc.StatusCode, bool], int] = {}
        self._durations: dict[tuple[str, bool], _Histogram] = {}
        self._fresh: dict[RedKey, dict[float, int]] = {}

    def add(
        self,
        method: str,
        tenant: str,
        code: grpc.StatusCode,
        streamed: bool,
        count: int,
        duration_s: float,
    ) -> None:
        """Counts ``count`` calls that took ``duration_s`` each."""
        key = (method, code, streamed)
        self._handled[key] = self._handled.get(key, 0) + count
        histogram = self._durations.get((method, streamed))
        if histogram is None:
            histogram = self._durations[method, streamed] = _Histogram()
        histogram.buckets[bisect_left(_BOUNDS_S, duration_s)] += count
        histogram.total_s += duration_s * count
        fresh_key = RedKey(method, tenant, code, streamed)
        fresh = self._fresh.get(fresh_key)
        if fresh is None:
            fresh = self._fresh[fresh_key] = {}
        rounded = float(f"{duration_s:.2g}")
        fresh[rounded] = fresh.get(rounded, 0) + count

    def drain(self) -> dict[RedKey, dict[float, int]]:
        """What was counted since the last drain: counts by duration in seconds, rounded."""
        fresh, self._fresh = self._fresh, {}
        return fresh

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        handled = CounterMetricFamily(
            "grpc_server_handled",
            "RPCs and stream items completed, by code.",
            labels=["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
        )
        for (method, code, streamed), count in list(self._handled.items()):
            handled.add_metric([*_labels(method, streamed), _code_name(code)], count)
        yield handled
        seconds = HistogramMetricFamily(
            "grpc_server_handling_seconds",
            "Time from receiving an RPC or stream item to its last answer.",
            labels=["grpc_type", "grpc_service", "grpc_method"],
        )
        for (method, streamed), histogram in list(self._durations.items()):
            seconds.add_metric(
                _labels(method, streamed), histogram.cumulative(), sum_value=histogram.total_s
            )
        yield seconds


class _Histogram:
    __slots__ = ("buckets", "total_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS_S) + 1)
        self.total_s = 0.0

    def cumulative(self) -> list[tuple[str, float]]:
        total, rows = 0, []
        for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), self.buckets, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


def _labels(method: str, streamed: bool) -> list[str]:
    service, _, name = method[1:].rpartition("/")
    return ["pipeline_item" if streamed else "unary", service, name]


def _code_name(code: grpc.StatusCode) -> str:
    return (
        "".join(part.capitalize() for part in code.name.split("_")) if code.name != "OK" else "OK"
    )
