"""Evaluates all rules at intervals, and keeps the states of their alerts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
import structlog

from agent360.client.errors import MeshError
from agent360.mesh.metrics.alerts.conditions import groups_that_hold
from agent360.mesh.metrics.alerts.documents import (
    AlertDocuments,
    alert_document,
    fault_document,
)
from agent360.mesh.metrics.alerts.lifecycle import Alert, AlertState, held, not_held
from agent360.mesh.metrics.alerts.rules import AlertRule, Labels
from agent360.mesh.metrics.ports import Document, StoreError
from agent360.mesh.metrics.queries.engine import QueryEngine

MAX_ALERTS: Final = 1_000
"""Alerts of one rule; one that would have more is not evaluated and says so."""

_RESOLVED_S: Final = 900.0
_UNTOLD_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class EvaluatorOptions:
    """How rules are evaluated."""

    every_s: float
    """Seconds between evaluations."""
    built_in: Sequence[AlertRule] = ()
    """Rules that come with the service."""


class AlertEvaluator:
    """Evaluates rules while it holds the lease; of several replicas one does.

    Invariant: while the lease is held, ``alerts`` is what the store has, but for times of alerts
    that did not change otherwise.

    Example:
        >>> evaluator = AlertEvaluator(engine, documents, EvaluatorOptions(15.0), log)
        >>> await evaluator.tick()
    """

    def __init__(
        self,
        engine: QueryEngine,
        documents: AlertDocuments,
        options: EvaluatorOptions,
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
        *,
        is_told: Callable[[Alert], bool] = lambda _: True,
    ) -> None:
        """Prepares an evaluator.

        Args:
            engine: answers the rules' queries.
            documents: rules and states.
            options: how rules are evaluated.
            log: told when a rule cannot be evaluated.
            now: a clock, Unix time.
            is_told: whether the receiver knows that an alert is resolved; until then it is kept.
        """
        self._engine = engine
        self._documents = documents
        self._options = options
        self._log = log
        self._now = now
        self._is_told = is_told
        self._faults: dict[tuple[str, str], str] = {}
        self._leased_s = 0.0
        self.leads = False
        """Whether this replica evaluates and notifies."""
        self.alerts: dict[str, Alert] = {}
        """By fingerprint, while it leads; also those that were resolved lately."""

    async def tick(self) -> None:
        """Evaluates all rules once, if this replica is the one that does.

        Raises:
            StoreError: rules and states cannot be read or written now; nothing has changed.
        """
        now_s = self._now()
        if not await self._take_lease():
            return
        rules = [*self._options.built_in, *await self._documents.rules()]
        if not self.leads:
            self.alerts = {each.fingerprint: each for each in await self._documents.alerts()}
            stored = await self._documents.faults()
            self._faults = {(each.tenant, each.name): each.body.decode() for each in stored}
            self.leads = True
        after: dict[str, Alert] = {}
        faults: dict[tuple[str, str], str] = {}
        by_rule: dict[tuple[str, str], list[Alert]] = {}
        for alert in self.alerts.values():
            by_rule.setdefault((alert.tenant, alert.rule_id), []).append(alert)
        for rule in rules:
            if (
                self._now() - self._leased_s > self._options.every_s
                and not await self._take_lease()
            ):
                return
            key = (rule.tenant, rule.rule_id)
            before = by_rule.pop(key, [])
            try:
                found = await self._evaluated(rule, before, now_s)
            except (MeshError, StoreError) as error:
                faults[key] = str(error)
                if key not in self._faults:
                    self._log.warning("an alert rule failed", tenant=key[0], rule=key[1],
                                      error=str(error))  # fmt: skip
                found = before
            after.update((each.fingerprint, each) for each in found)
        for orphans in by_rule.values():
            left = (not_held(0.0, each, now_s) for each in orphans)
            after.update((each.fingerprint, each) for each in left if each is not None)
        await self._keep(self._lasting(after.values(), now_s), faults)

    async def _take_lease(self) -> bool:
        """Takes or keeps the lease; if another replica has it, what is known here is outdated."""
        self._leased_s = self._now()
        if await self._documents.lease(self._leased_s, 4 * self._options.every_s):
            return True
        self.leads = False
        self.alerts.clear()
        return False

    async def close(self) -> None:
        """Leaves the work to another replica."""
        if self.leads:
            self.leads = False
            await self._documents.lease(self._now(), 0.0)

    async def _evaluated(
        self, rule: AlertRule, before: Sequence[Alert], now_s: float
    ) -> list[Alert]:
        """The rule's alerts after an evaluation."""
        values = await groups_that_hold(self._engine, rule, now_s)
        holding: dict[Labels, float] = {}
        for group, value in values.items():
            holding[rule.labels_of(group)] = value
        if len(holding) > MAX_ALERTS:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUERY_TOO_LARGE",
                f"the condition holds for {len(holding):,} groups; a rule may have {MAX_ALERTS:,} "
                "alerts: group by fewer labels",
            )
        known = {each.labels: each for each in before}
        found = [
            held(rule, known.pop(labels, None), labels, value, now_s)
            for labels, value in holding.items()
        ]
        left = (not_held(rule.keep_firing_for_s, each, now_s) for each in known.values())
        return [*found, *(each for each in left if each is not None)]

    def _lasting(self, alerts: Iterable[Alert], now_s: float) -> dict[str, Alert]:
        """Without those that were resolved a while ago and whose receiver knows it."""
        kept = {}
        for each in alerts:
            age_s = now_s - each.resolved_s
            over = each.state is AlertState.RESOLVED and (
                age_s > _UNTOLD_S or (age_s > _RESOLVED_S and self._is_told(each))
            )
            if not over:
                kept[each.fingerprint] = each
        return kept

    async def _keep(self, alerts: dict[str, Alert], faults: Mapping[tuple[str, str], str]) -> None:
        """Stores what changed."""
        changed = [
            alert_document(each) for name, each in alerts.items() if each != self.alerts.get(name)
        ]
        gone = [alert_document(e) for name, e in self.alerts.items() if name not in alerts]
        faulty = [
            fault_document(*key, text)
            for key, text in faults.items()
            if self._faults.get(key) != text
        ]
        well: list[Document] = [
            fault_document(*key, "") for key in self._faults if key not in faults
        ]
        await self._documents.put([*changed, *faulty], [*gone, *well])
        self.alerts, self._faults = alerts, dict(faults)
