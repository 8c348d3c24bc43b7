"""Runs evaluation and notification in the background."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from agent360.client.errors import MeshError
from agent360.mesh.metrics.alerts.documents import AlertDocuments
from agent360.mesh.metrics.alerts.evaluator import AlertEvaluator, EvaluatorOptions
from agent360.mesh.metrics.alerts.lifecycle import Alert, AlertState
from agent360.mesh.metrics.alerts.notifier import Notifier, NotifierOptions
from agent360.mesh.metrics.alerts.rules import AlertRule
from agent360.mesh.metrics.alerts.settings import AlertSettings
from agent360.mesh.metrics.alerts.slo import slo_rules
from agent360.mesh.metrics.alerts.webhook import Webhook
from agent360.mesh.metrics.ports import RuleStore, StoreError
from agent360.mesh.metrics.queries.engine import QueryEngine

_NOTIFY_EVERY_S: Final = 1.0


class AlertService:
    """Evaluates rules and tells the receiver.

    Example:
        >>> alerts = AlertService(settings.alerts, stores.rules, engine, log)
        >>> alerts.start()
        >>> await alerts.close()
    """

    def __init__(
        self,
        settings: AlertSettings,
        store: RuleStore,
        engine: QueryEngine,
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._log = log
        self._now = now
        self.documents = AlertDocuments(store)
        self.built_in: tuple[AlertRule, ...] = slo_rules(settings.slo) if settings.enabled else ()
        """The rules that come with the service."""
        self._webhook = _webhook(settings)
        self._notifier: Notifier | None = None
        if self._webhook is not None:
            options = NotifierOptions(
                settings.group_by,
                settings.group_wait_s,
                settings.group_interval_s,
                settings.repeat_interval_s,
            )
            self._notifier = Notifier(self.documents, self._webhook, options, log, now)
        self._evaluator = AlertEvaluator(
            engine,
            self.documents,
            EvaluatorOptions(settings.evaluate_every_s, self.built_in),
            log,
            now,
            is_told=self._is_told,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._failing: set[str] = set()
        self.evaluations = 0
        """Since the start."""

    def start(self) -> None:
        """Begins to evaluate and notify, if that is to be done here."""
        if self._settings.enabled:
            self._tasks = [
                asyncio.create_task(self._repeat(self._settings.evaluate_every_s, self.evaluate)),
                asyncio.create_task(self._repeat(_NOTIFY_EVERY_S, self.notify)),
            ]

    async def close(self) -> None:
        """Ends, and leaves the work to another replica."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(StoreError):
            await self._evaluator.close()
        if self._webhook is not None:
            await self._webhook.close()

    async def evaluate(self) -> None:
        """Evaluates all rules once.

        Raises:
            StoreError: the store cannot be used now.
        """
        await self._evaluator.tick()
        self.evaluations += 1

    async def notify(self) -> None:
        """Tells of what is due.

        Raises:
            StoreError: the store cannot be used now.
        """
        if self._notifier is None:
            return
        if self._evaluator.leads:
            await self._notifier.tick(list(self._evaluator.alerts.values()))
        else:
            self._notifier.forget()

    def collect(self) -> Iterator[Metric]:
        """Metrics for Prometheus."""
        yield CounterMetricFamily(
            "metrics_alert_evaluations", "Evaluations of all alert rules.", self.evaluations
        )
        alerts = GaugeMetricFamily(
            "metrics_alerts", "Alerts of the replica that evaluates.", labels=["state"]
        )
        states = [each.state for each in self._evaluator.alerts.values()]
        for state in (AlertState.PENDING, AlertState.FIRING):
            alerts.add_metric([state.name.lower()], states.count(state))
        yield alerts
        sent = CounterMetricFamily(
            "metrics_notifications", "Notifications of alerts.", labels=["outcome"]
        )
        sent.add_metric(["delivered"], self._notifier.sent if self._notifier else 0)
        sent.add_metric(["failed"], self._notifier.failed if self._notifier else 0)
        yield sent

    def _is_told(self, alert: Alert) -> bool:
        return self._notifier is None or self._notifier.is_told(alert)

    async def _repeat(self, interval_s: float, work: Callable[[], Awaitable[None]]) -> None:
        name = work.__name__ if hasattr(work, "__name__") else "alerts"
        while True:
            try:
                await work()
                self._failing.discard(name)
            except (StoreError, MeshError) as error:
                if name not in self._failing:
                    self._log.error("alerts: repeated until it succeeds", work=name,
                                    error=str(error))  # fmt: skip
                self._failing.add(name)
            except Exception as error:  # noqa: BLE001 - alerts must go on whatever one rule did
                self._log.error("alerts: a fault", work=name, exc_info=error)
            await asyncio.sleep(interval_s)


def _webhook(settings: AlertSettings) -> Webhook | None:
    webhook = settings.webhook
    url = webhook.url.get_secret_value()
    if not url:
        return None
    return Webhook(
        url,
        {name: value.get_secret_value() for name, value in webhook.headers.items()},
        timeout_s=webhook.timeout_s,
        external_url=webhook.external_url,
        max_alerts=webhook.max_alerts,
    )
