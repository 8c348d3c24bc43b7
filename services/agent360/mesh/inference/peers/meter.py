"""What happened, told to Prometheus and to the metrics service."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from agent360.client import Mesh
from agent360.mesh.inference.answers import Usage
from agent360.mesh.inference.peers.usage_log import UsageLog
from agent360.mesh.inference.ports import UsageRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class MeshMeter:
    """The port ``Meter``; only the metrics service is told of tenants, Prometheus is not."""

    def __init__(self, mesh: Mesh, registry: CollectorRegistry, usage: UsageLog) -> None:
        self._metrics = mesh.metrics
        self._usage = usage
        self._bound: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._bound_tokens: dict[tuple[str, ...], Counter] = {}
        self._answers = Counter(
            "inference_answers",
            "Answers given, by model and by where they came from.",
            ["model", "source"],
            registry=registry,
        )
        self._failures = Counter(
            "inference_failures",
            "Requests that got no answer, by model and reason.",
            ["model", "reason"],
            registry=registry,
        )
        self._tokens = Counter(
            "inference_tokens",
            "Tokens that models took in and gave out.",
            ["model", "backend", "direction"],
            registry=registry,
        )
        self._cost = Counter(
            "inference_cost_usd", "What models cost, in US dollars.", ["model"], registry=registry
        )
        self._latency = Histogram(
            "inference_latency_seconds",
            "Time from a request to the end of its answer.",
            ["model", "source"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "inference_first_token_seconds",
            "Time from a request to the first token of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )

    def record(self, record: UsageRecord) -> None:
        """See ``Meter.record``."""
        payer, metrics = record.payer, self._metrics
        tenant, model = payer.tenant, payer.model
        if record.source is None:
            self._failures.labels(model, record.outcome).inc()
            reasons = {"model": model, "reason": record.outcome}
            metrics.count("inference_failures_total", labels=reasons, tenant=tenant)
        else:
            source = record.source.value
            answers, latency = self._series(model, source)
            answers.inc()
            latency.observe(record.total_s)
            labels = {"model": model, "source": source}
            metrics.count("inference_answers_total", labels=labels, tenant=tenant)
            metrics.observe("inference_latency_seconds", record.total_s, labels, tenant)
            if record.first_token_s is not None:
                self._first_token.labels(model).observe(record.first_token_s)
                metrics.observe(
                    "inference_first_token_seconds", record.first_token_s, labels, tenant
                )
        self._usage.note(record)

    def _series(self, model: str, source: str) -> tuple[Counter, Histogram]:
        """The series of a model's answers; looking labels up costs more than counting."""
        found = self._bound.get((model, source))
        if found is None:
            found = self._answers.labels(model, source), self._latency.labels(model, source)
            self._bound[model, source] = found
        return found

    def _tokens_of(self, *labels: str) -> Counter:
        found = self._bound_tokens.get(labels)
        if found is None:
            found = self._bound_tokens[labels] = self._tokens.labels(*labels)
        return found

    def consumed(
        self, tenant: str, model: str, backend: str, usage: Usage, cost_usd: float
    ) -> None:
        """See ``Meter.consumed``."""
        for direction, tokens in (("input", usage.input_tokens), ("output", usage.output_tokens)):
            if tokens:
                self._tokens_of(model, backend, direction).inc(tokens)
                labels = {"model": model, "direction": direction}
                self._metrics.count("inference_tokens_total", tokens, labels, tenant)
        if cost_usd:
            self._cost.labels(model).inc(cost_usd)
            self._metrics.count("inference_cost_usd_total", cost_usd, {"model": model}, tenant)
