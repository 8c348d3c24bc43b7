"""What is counted of models, and who is told of tenants."""

from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest

from agent360.mesh.inference.queueing import Statistics
from agent360.mesh.runtime.call import MESH_TENANT


class Heard:
    """What the metrics service was told."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str, str]] = Counter()
        self.observed: dict[str, list[float]] = {}

    def count(
        self,
        name: str,
        value: float = 1.0,
        labels: dict[str, str] | None = None,
        tenant: str = "",
    ) -> None:
        self.rows[name, tenant, (labels or {}).get("reason", "")] += int(value)

    def observe(
        self, name: str, value: float, labels: dict[str, str] | None = None, tenant: str = ""
    ) -> None:
        self.rows[name, tenant, ""] += 1
        self.observed.setdefault(name, []).append(value)


def test_prometheus_gets_tritons_measures_without_tenants() -> None:
    statistics = Statistics()
    registry = CollectorRegistry()
    registry.register(statistics)
    counts = statistics.of("small")
    counts.pending = 3
    counts.began("acme", 0.02)
    counts.executed(5, 0.3)
    counts.succeeded("acme", 0.32, 0.3, 0.1)
    counts.failed("acme", "QUEUE_FULL")
    text = generate_latest(registry).decode()
    for line in (
        'inference_request_success_total{model="small"} 1.0',
        'inference_request_failure_total{model="small",reason="QUEUE_FULL"} 1.0',
        'inference_count_total{model="small"} 5.0',
        'inference_exec_count_total{model="small"} 1.0',
        'inference_pending_requests{model="small"} 3.0',
        'inference_request_duration_seconds_sum{model="small"} 0.32',
        'inference_queue_duration_seconds_sum{model="small"} 0.02',
        'inference_compute_duration_seconds_sum{model="small"} 0.3',
        'inference_first_response_seconds_bucket{le="0.1",model="small"} 1.0',
        'inference_batch_size_bucket{le="4",model="small"} 0.0',
        'inference_batch_size_bucket{le="8",model="small"} 1.0',
    ):
        assert line in text
    assert "acme" not in text


def test_the_metrics_service_gets_them_with_tenants() -> None:
    heard = Heard()
    counts = Statistics(heard).of("small")
    counts.began("acme", 0.0234)
    counts.succeeded("acme", 0.32, 0.3, 0.1)
    counts.failed("zeta", "QUEUE_FULL")
    assert heard.rows == {
        ("inference_queue_duration_seconds", "acme", ""): 1,
        ("inference_request_success_total", "acme", ""): 1,
        ("inference_request_duration_seconds", "acme", ""): 1,
        ("inference_compute_duration_seconds", "acme", ""): 1,
        ("inference_request_failure_total", "zeta", "QUEUE_FULL"): 1,
    }


def test_sizes_of_batches_are_told_under_no_callers_name() -> None:
    heard = Heard()
    counts = Statistics(heard).of("embedder")
    counts.executed(64, 0.2)
    counts.executed(1, 0.1)
    assert heard.observed == {"inference_batch_size": [64.0, 1.0]}
    assert heard.rows == {("inference_batch_size", MESH_TENANT, ""): 2}
