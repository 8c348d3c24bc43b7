"""The life of an alert: pending, firing, resolved; as in Prometheus."""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import Final

import msgspec

from agent360.mesh.metrics.alerts.rules import AlertRule, Labels, filled_in

OUTAGE_S: Final = 3_600.0
"""An alert that pends goes on pending if it was not evaluated for up to this long, such as while
the service was away; after a longer time it begins anew."""


class AlertState(IntEnum):
    """Where an alert stands; the first two as in the contract."""

    PENDING = 1
    FIRING = 2
    RESOLVED = 3


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """An alert of a rule and a set of labels. All times are Unix time."""

    tenant: str
    rule_id: str
    labels: Labels
    state: AlertState
    since_s: float
    """Since when the condition holds; of one that fires or fired, when it began to pend."""
    fired_s: float = 0.0
    held_s: float
    """When the condition last held."""
    evaluated_s: float
    resolved_s: float = 0.0
    value: float
    """The value when the condition last held."""
    annotations: Labels

    @property
    def fingerprint(self) -> str:
        """Names the alert by its labels: 16 hexadecimal digits."""
        text = "\0".join((self.tenant, *(f"{name}\1{value}" for name, value in self.labels)))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def state_s(self) -> float:
        """Since when it is in its state."""
        times = {AlertState.FIRING: self.fired_s, AlertState.RESOLVED: self.resolved_s}
        return times.get(self.state, self.since_s)


def held(rule: AlertRule, alert: Alert | None, labels: Labels, value: float, now_s: float) -> Alert:
    """The alert after an evaluation at which the condition held."""
    annotations = tuple((name, filled_in(text, labels, value)) for name, text in rule.annotations)
    began = alert is None or alert.state is AlertState.RESOLVED
    if alert is not None and alert.state is AlertState.PENDING:
        began = now_s - alert.evaluated_s > OUTAGE_S
    since_s = now_s if alert is None or began else alert.since_s
    firing = alert is not None and alert.state is AlertState.FIRING
    if not firing and now_s - since_s >= rule.for_s:
        firing, fired_s = True, now_s
    else:
        fired_s = alert.fired_s if alert is not None and firing else 0.0
    return Alert(
        tenant=rule.tenant,
        rule_id=rule.rule_id,
        labels=labels,
        state=AlertState.FIRING if firing else AlertState.PENDING,
        since_s=since_s,
        fired_s=fired_s,
        held_s=now_s,
        evaluated_s=now_s,
        value=value,
        annotations=annotations,
    )


def not_held(keep_firing_for_s: float, alert: Alert, now_s: float) -> Alert | None:
    """The alert after an evaluation at which the condition did not hold; None: it is gone."""
    if alert.state is AlertState.PENDING:
        return None
    if alert.state is AlertState.RESOLVED:
        return alert
    if now_s - alert.held_s < keep_firing_for_s:
        return msgspec.structs.replace(alert, evaluated_s=now_s)
    return msgspec.structs.replace(
        alert, state=AlertState.RESOLVED, evaluated_s=now_s, resolved_s=now_s
    )
