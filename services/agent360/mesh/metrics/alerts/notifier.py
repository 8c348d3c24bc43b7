"""Decides which groups of alerts the receiver is told about, and when; as Alertmanager does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from agent360.mesh.metrics.alerts.documents import AlertDocuments, Notified, notified_document
from agent360.mesh.metrics.alerts.lifecycle import Alert, AlertState
from agent360.mesh.metrics.alerts.rules import Labels
from agent360.mesh.metrics.alerts.silences import silenced_by
from agent360.mesh.metrics.alerts.webhook import NotDeliveredError, Notification, Receiver
from agent360.mesh.metrics.queries.query import TENANT_LABEL

_FIRST_BACKOFF_S: Final = 1.0
_MAX_BACKOFF_S: Final = 60.0
_AT_ONCE: Final = 8
_FORGOTTEN_S: Final = 5 * 86_400.0


@dataclass(frozen=True, slots=True)
class NotifierOptions:
    """How alerts are grouped, and when the receiver is told. All durations are seconds."""

    group_by: tuple[str, ...]
    """Alerts of a tenant with the same values of these labels are told of together."""
    group_wait_s: float
    """How long the first notification of a group waits for more alerts."""
    group_interval_s: float
    """How long after a notification the next tells of changes."""
    repeat_interval_s: float
    """How long after a notification it is repeated if nothing changed."""


@dataclass(slots=True)
class _Group:
    """What is going on with a group; what was told of it is in the store, too."""

    due_s: float
    """When it is looked at next, Unix time."""
    told: Notified | None = None
    failures: int = 0
    alerts: list[Alert] = field(default_factory=list)


class Notifier:
    """Tells a receiver of alerts: at least once, and after a restart not again.

    Example:
        >>> notifier = Notifier(documents, webhook, options, log)
        >>> await notifier.tick(evaluator.alerts.values())
    """

    def __init__(
        self,
        documents: AlertDocuments,
        receiver: Receiver,
        options: NotifierOptions,
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._documents = documents
        self._receiver = receiver
        self._options = options
        self._log = log
        self._now = now
        self._groups: dict[str, _Group] | None = None
        self.sent = 0
        """Notifications that were delivered."""
        self.failed = 0
        """Attempts that were not."""

    def forget(self) -> None:
        """Another replica notifies now; what it tells is read from the store when it ends."""
        self._groups = None

    def is_told(self, alert: Alert) -> bool:
        """Whether the receiver does not think that an alert is firing."""
        if self._groups is None:
            return False
        group = self._groups.get(self._key(alert))
        return group is None or group.told is None or alert.fingerprint not in group.told.firing

    async def tick(self, alerts: Iterable[Alert]) -> None:
        """Tells of all groups that are due.

        Args:
            alerts: all there are, also those that were resolved lately.

        Raises:
            StoreError: what was told cannot be read or written now; it may be told again.
        """
        now_s = self._now()
        groups = await self._known()
        silences = await self._documents.silences()
        for group in groups.values():
            group.alerts = []
        for alert in alerts:
            if alert.state is AlertState.PENDING or silenced_by(alert, silences, now_s):
                continue
            key = self._key(alert)
            if key not in groups:
                if alert.state is AlertState.RESOLVED:
                    continue
                groups[key] = _Group(now_s + self._options.group_wait_s)
            groups[key].alerts.append(alert)
        due = [(key, group) for key, group in groups.items() if group.due_s <= now_s]
        for first in range(0, len(due), _AT_ONCE):
            await asyncio.gather(
                *(self._look_at(key, group, now_s) for key, group in due[first : first + _AT_ONCE])
            )
        for key, group in due:
            if group.told is None and not group.alerts and not group.failures:
                del groups[key]

    async def _known(self) -> dict[str, _Group]:
        if self._groups is None:
            interval_s = self._options.group_interval_s
            self._groups = {
                each.key: _Group(each.sent_s + interval_s, each)
                for each in await self._documents.notified()
            }
        return self._groups

    async def _look_at(self, key: str, group: _Group, now_s: float) -> None:
        """Tells of a group what there is to tell."""
        alerts = self._to_tell(group, now_s)
        if not alerts:
            group.due_s = now_s + self._options.group_interval_s
            told = group.told
            if told is not None and (not told.firing or now_s - told.sent_s > _FORGOTTEN_S):
                await self._documents.put((), [notified_document(told)])
                group.told = None
            return
        shared = self._shared(alerts[0])
        try:
            await self._receiver.deliver(Notification(key, shared, alerts))
        except NotDeliveredError as error:
            self.failed += 1
            if not group.failures:
                self._log.warning("notification failed; it is repeated", error=str(error))
            backoff_s = min(_FIRST_BACKOFF_S * 2.0 ** min(group.failures, 10), _MAX_BACKOFF_S)
            group.failures += 1
            group.due_s = now_s + backoff_s
            return
        self.sent += 1
        group.failures = 0
        group.due_s = now_s + self._options.group_interval_s
        firing = tuple(
            sorted(each.fingerprint for each in alerts if each.state is AlertState.FIRING)
        )
        group.told = Notified(key, alerts[0].tenant, now_s, firing)
        await self._documents.put([notified_document(group.told)])

    def _to_tell(self, group: _Group, now_s: float) -> list[Alert]:
        """The alerts of the next notification; none if nothing changed for long enough."""
        told = frozenset(group.told.firing) if group.told is not None else frozenset()
        firing = [each for each in group.alerts if each.state is AlertState.FIRING]
        resolved = [
            each
            for each in group.alerts
            if each.state is AlertState.RESOLVED and each.fingerprint in told
        ]
        changed = bool(resolved) or any(each.fingerprint not in told for each in firing)
        is_old = (
            group.told is not None and now_s - group.told.sent_s >= self._options.repeat_interval_s
        )
        if not changed and not (is_old and firing):
            return []
        return sorted((*firing, *resolved), key=lambda alert: alert.labels)

    def _shared(self, alert: Alert) -> Labels:
        labels: Mapping[str, str] = dict(alert.labels)
        names = (TENANT_LABEL, *(n for n in self._options.group_by if n != TENANT_LABEL))
        return tuple((name, labels[name]) for name in names if name in labels)

    def _key(self, alert: Alert) -> str:
        labels = ", ".join(f'{name}="{value}"' for name, value in self._shared(alert))
        return f"{alert.tenant}:{{{labels}}}"
