"""Counts of tries, retries, fallbacks and hedges, for Prometheus and the metrics service."""

from __future__ import annotations

import functools
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from agent360.client.metrics import MetricsClient
from agent360.mesh.inference.failover.breaker import Breaker, Breakers, State

HedgeOutcome = Literal["won", "lost", "failed", "denied"]


class Tally:
    """Counts what happened beyond the first try of a request.

    ``inference_breaker_state`` is 0 while a backend's breaker is closed, 1 half open, 2 open.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        breakers: Breakers,
        metrics: MetricsClient | None = None,
        log: structlog.stdlib.BoundLogger | None = None,
    ) -> None:
        """Begins to count.

        Args:
            registry: where Prometheus finds the counts.
            breakers: whose states are told.
            metrics: the metrics service; None: it is not told.
            log: says when breakers open and close; None: nothing does.
        """
        self._metrics = metrics
        self._log = log
        breakers.watch(self._breaker_changed)
        self._tries = Counter(
            "inference_tries",
            "Requests to backends, by how they ended: ok, cancelled, lost, or the error's reason.",
            ["model", "backend", "outcome"],
            registry=registry,
        )
        self._bound_tries: dict[tuple[str, str, str], Counter] = {}
        self._retries = Counter(
            "inference_retries",
            "Tries after a failure at the same model, by the reason of that failure.",
            ["model", "reason"],
            registry=registry,
        )
        self._denied = Counter(
            "inference_retries_denied",
            "Retries that the budget did not allow.",
            ["model"],
            registry=registry,
        )
        self._fallbacks = Counter(
            "inference_fallbacks",
            "Tries of a fallback instead of the model that was asked for.",
            ["model", "fallback"],
            registry=registry,
        )
        self._hedges = Counter(
            "inference_hedges",
            "Second tries beside a slow one: won, lost, failed, or denied by the budget.",
            ["model", "outcome"],
            registry=registry,
        )
        state = Gauge(
            "inference_breaker_state",
            "State of a backend's circuit breaker: 0 closed, 1 half open, 2 open.",
            ["backend"],
            registry=registry,
        )
        opened = Gauge(
            "inference_breaker_opened",
            "How often a backend's circuit breaker has opened.",
            ["backend"],
            registry=registry,
        )
        for name in breakers.names():
            breaker = breakers.of(name)
            state.labels(name).set_function(functools.partial(_state_of, breaker))
            opened.labels(name).set_function(functools.partial(_opened, breaker))

    def tried(self, model: str, backend: str, outcome: str) -> None:
        """A try ended: ``ok``, ``cancelled``, ``lost`` to a rival, or an error's reason."""
        ended = (model, backend, outcome)
        counter = self._bound_tries.get(ended)
        if counter is None:
            # Looking labels up costs more than counting.
            counter = self._bound_tries[ended] = self._tries.labels(*ended)
        counter.inc()

    def retried(self, tenant: str, model: str, reason: str) -> None:
        """A model is asked again after a failure."""
        self._retries.labels(model, reason).inc()
        self._tell("inference_retries_total", {"model": model, "reason": reason}, tenant)

    def denied(self, model: str) -> None:
        """The budget did not allow a retry."""
        self._denied.labels(model).inc()

    def fell_back(self, tenant: str, model: str, fallback: str) -> None:
        """A fallback is asked."""
        self._fallbacks.labels(model, fallback).inc()
        self._tell("inference_fallbacks_total", {"model": model, "fallback": fallback}, tenant)

    def hedged(self, tenant: str, model: str, outcome: HedgeOutcome) -> None:
        """A hedge ended, or was not allowed."""
        self._hedges.labels(model, outcome).inc()
        self._tell("inference_hedges_total", {"model": model, "outcome": outcome}, tenant)

    def _breaker_changed(self, backend: str, state: State, why: str) -> None:
        labels = {"backend": backend, "state": state.name.lower()}
        self._tell("inference_breaker_changes_total", labels)
        if self._log is None:
            return
        if state is State.OPEN:
            self._log.warning("backend is left alone for a while", backend=backend, reason=why)
        else:
            self._log.info("backend is asked again", backend=backend)

    def _tell(self, name: str, labels: dict[str, str], tenant: str = "") -> None:
        if self._metrics is not None:
            self._metrics.count(name, labels=labels, tenant=tenant)


def _state_of(breaker: Breaker) -> float:
    return breaker.state.value


def _opened(breaker: Breaker) -> float:
    return breaker.opened
