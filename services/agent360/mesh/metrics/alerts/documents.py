"""Rules, alerts, silences and what was notified, as documents of the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from agent360.mesh.metrics.alerts.lifecycle import Alert
from agent360.mesh.metrics.alerts.reading import read_rule, read_silence
from agent360.mesh.metrics.alerts.rules import AlertRule
from agent360.mesh.metrics.alerts.silences import Silence
from agent360.mesh.metrics.ports import Document, RuleStore
from agent360.metrics.v1 import metrics_pb2 as pb

RULE: Final = "rule"
FAULT: Final = "rule_fault"
ALERT: Final = "alert"
SILENCE: Final = "silence"
NOTIFIED: Final = "notified"

_MAX_PARSED: Final = 10_000


class Notified(msgspec.Struct, frozen=True):
    """What the receiver was last told of a group of alerts."""

    key: str
    """Names the group."""
    tenant: str
    sent_s: float
    """When, Unix time."""
    firing: tuple[str, ...]
    """Fingerprints of the alerts that it was told to be firing."""


class AlertDocuments:
    """Reads and writes them; nothing is kept here, so that all replicas see the same.

    Example:
        >>> documents = AlertDocuments(stores.rules)
        >>> await documents.put([alert_document(alert)])
    """

    def __init__(self, store: RuleStore) -> None:
        self._store = store
        self._parsed: dict[tuple[str, bytes], AlertRule] = {}

    async def put(self, documents: Sequence[Document], gone: Sequence[Document] = ()) -> None:
        """Stores documents and removes others, all at once."""
        if documents or gone:
            await self._store.put(documents, gone)

    async def lease(self, now_s: float, for_s: float) -> bool:
        """Whether this replica is the one that evaluates and notifies."""
        return await self._store.lease("alerts", now_s, for_s)

    async def rules(self, tenant: str | None = None) -> list[AlertRule]:
        """The rules of a tenant; None: of all."""
        return [self._rule(each) for each in await self._store.documents(RULE, tenant)]

    async def rule_messages(self, tenant: str) -> list[Any]:
        """The rules of a tenant as messages, with the faults of their last evaluation."""
        faults = {each.name: each.body.decode() for each in await self.faults(tenant)}
        found = []
        for each in await self._store.documents(RULE, tenant):
            message = pb.AlertRule.FromString(each.body)
            message.last_error = faults.get(each.name, "")
            found.append(message)
        return found

    async def faults(self, tenant: str | None = None) -> list[Document]:
        """Why rules could not be evaluated: a text in the body, by rule."""
        return await self._store.documents(FAULT, tenant)

    async def alerts(self, tenant: str | None = None) -> list[Alert]:
        """The alerts of a tenant, also those that were resolved lately; None: of all."""
        found = await self._store.documents(ALERT, tenant)
        return [msgspec.json.decode(each.body, type=Alert) for each in found]

    async def notified(self) -> list[Notified]:
        """What the receiver was told."""
        found = await self._store.documents(NOTIFIED)
        return [msgspec.json.decode(each.body, type=Notified) for each in found]

    async def silence_messages(self, tenant: str | None = None) -> list[tuple[str, Any]]:
        """The silences of a tenant, with their tenants; None: of all."""
        return [
            (each.tenant, pb.Silence.FromString(each.body))
            for each in await self._store.documents(SILENCE, tenant)
        ]

    async def silences(self, tenant: str | None = None) -> list[Silence]:
        """The same as domain values."""
        return [
            read_silence(owner, message.silence_id, message)
            for owner, message in await self.silence_messages(tenant)
        ]

    def _rule(self, document: Document) -> AlertRule:
        key = (document.tenant, document.body)
        rule = self._parsed.get(key)
        if rule is None:
            rule = read_rule(document.tenant, pb.AlertRule.FromString(document.body))
            if len(self._parsed) >= _MAX_PARSED:
                self._parsed.clear()
            self._parsed[key] = rule
        return rule


def rule_document(tenant: str, message: Any) -> Document:
    """A rule as it is stored."""
    kept = pb.AlertRule()
    kept.CopyFrom(message)
    for field in ("built_in", "last_error"):
        kept.ClearField(field)
    return Document(tenant, RULE, message.rule_id, kept.SerializeToString(deterministic=True))


def fault_document(tenant: str, rule_id: str, fault: str) -> Document:
    """Why a rule could not be evaluated."""
    return Document(tenant, FAULT, rule_id, fault.encode())


def alert_document(alert: Alert) -> Document:
    """An alert as it is stored; of a rule and set of labels there is one."""
    return Document(alert.tenant, ALERT, alert.fingerprint, msgspec.json.encode(alert))


def notified_document(notified: Notified) -> Document:
    """What the receiver was told, as it is stored."""
    return Document(notified.tenant, NOTIFIED, notified.key, msgspec.json.encode(notified))


def silence_document(tenant: str, message: Any) -> Document:
    """A silence as it is stored."""
    body = message.SerializeToString(deterministic=True)
    return Document(tenant, SILENCE, message.silence_id, body)
