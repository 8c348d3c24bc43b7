"""The RPCs of alert rules, alerts and silences."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import grpc

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.metrics.alerts.documents import (
    RULE,
    SILENCE,
    fault_document,
    rule_document,
    silence_document,
)
from agent360.mesh.metrics.alerts.lifecycle import AlertState
from agent360.mesh.metrics.alerts.messages import alert_message, built_in_message
from agent360.mesh.metrics.alerts.reading import read_rule, read_silence
from agent360.mesh.metrics.alerts.service import AlertService
from agent360.mesh.metrics.alerts.silences import KEPT_S, silenced_by
from agent360.mesh.metrics.ports import Document
from agent360.mesh.metrics.queries.messages import without_page
from agent360.mesh.metrics.queries.reading import asked_tenant
from agent360.mesh.metrics.storage import stored
from agent360.mesh.runtime.call import ANY_TENANT, MESH_TENANT, Call
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.service import UnaryHandler
from agent360.metrics.v1 import metrics_pb2 as pb

T = TypeVar("T")

METHODS: Final = (
    "SetAlertRule",
    "ListAlertRules",
    "DeleteAlertRule",
    "ListAlerts",
    "CreateSilence",
    "ListSilences",
    "ExpireSilence",
)
"""The RPCs that are handled here."""

_MAX_SILENCES: Final = 1_000


class AlertRpcs:
    """Changes and lists what the alert service works with."""

    def __init__(
        self, alerts: AlertService, *, max_rules: int, now: Callable[[], float] = time.time
    ) -> None:
        self._alerts = alerts
        self._documents = alerts.documents
        self._max_rules = max_rules
        self._now = now
        self._handlers: dict[str, UnaryHandler] = {
            "SetAlertRule": self.set_alert_rule,
            "ListAlertRules": self.list_alert_rules,
            "DeleteAlertRule": self.delete_alert_rule,
            "ListAlerts": self.list_alerts,
            "CreateSilence": self.create_silence,
            "ListSilences": self.list_silences,
            "ExpireSilence": self.expire_silence,
        }

    async def handle(self, name: str, call: Call, request: Any) -> Any:
        """Answers one of ``METHODS``."""
        return await self._handlers[name](call, request)

    async def close(self) -> None:
        """Ends what works in the background."""
        await self._alerts.close()

    # ---------------------------------------------------------------- rules

    async def set_alert_rule(self, call: Call, request: Any) -> Any:
        """Makes or replaces a rule."""
        rule = read_rule(call.tenant, request.rule)
        self._refuse_built_in(call.tenant, rule.rule_id)
        known = {each.rule_id for each in await stored(self._documents.rule_messages(call.tenant))}
        if rule.rule_id not in known and len(known) >= self._max_rules:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "ALERT_RULES_EXHAUSTED",
                f"tenant {call.tenant} has {len(known):,} alert rules, the most it may have "
                "(alerts.max_rules): delete one",
            )
        document = rule_document(call.tenant, request.rule)
        await stored(self._documents.put([document]))
        return pb.SetAlertRuleResponse(rule=pb.AlertRule.FromString(document.body))

    async def list_alert_rules(self, call: Call, request: Any) -> Any:
        """Lists the tenant's rules; those that come with the service are the mesh's."""
        masked = read_mask(request, pb.AlertRule)
        found = await stored(self._documents.rule_messages(call.tenant))
        if call.tenant == MESH_TENANT and self._alerts.built_in:
            stored_faults = await stored(self._documents.faults(MESH_TENANT))
            faults = {each.name: each.body.decode() for each in stored_faults}
            built_in = (
                built_in_message(each, faults.get(each.rule_id, ""))
                for each in self._alerts.built_in
            )
            found = sorted((*found, *built_in), key=lambda rule: rule.rule_id)
        page, token = _page(call, request, found, lambda rule: [rule.rule_id])
        return pb.ListAlertRulesResponse(
            rules=[masked(rule) for rule in page], next_page_token=token
        )

    async def delete_alert_rule(self, call: Call, request: Any) -> Any:
        """Removes a rule; its alerts are resolved."""
        self._refuse_built_in(call.tenant, request.rule_id)
        known = await stored(self._documents.rule_messages(call.tenant))
        if all(each.rule_id != request.rule_id for each in known):
            raise _unknown("ALERT_RULE_UNKNOWN", f"alert rule {request.rule_id!r}")
        gone = [
            Document(call.tenant, RULE, request.rule_id, b""),
            fault_document(call.tenant, request.rule_id, ""),
        ]
        await stored(self._documents.put((), gone))
        return pb.DeleteAlertRuleResponse()

    def _refuse_built_in(self, tenant: str, rule_id: str) -> None:
        if tenant == MESH_TENANT and any(r.rule_id == rule_id for r in self._alerts.built_in):
            raise MeshError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "ALERT_RULE_BUILT_IN",
                f"{rule_id} comes with the service; its settings are alerts.slo",
            )

    # ---------------------------------------------------------------- alerts

    async def list_alerts(self, call: Call, request: Any) -> Any:
        """Lists alerts that are pending or firing."""
        masked = read_mask(request, pb.Alert)
        tenant = asked_tenant(call)
        silences = await stored(self._documents.silences(tenant))
        alerts = [
            each
            for each in await stored(self._documents.alerts(tenant))
            if each.state is not AlertState.RESOLVED and request.state in {0, each.state}
        ]
        alerts.sort(key=lambda alert: (alert.rule_id, alert.labels, alert.tenant))
        page, token = _page(
            call,
            request,
            alerts,
            lambda alert: [alert.rule_id, [list(pair) for pair in alert.labels], alert.tenant],
        )
        now_s = self._now()
        return pb.ListAlertsResponse(
            alerts=[
                masked(alert_message(each, silenced_by(each, silences, now_s))) for each in page
            ],
            next_page_token=token,
        )

    # ---------------------------------------------------------------- silences

    async def create_silence(self, call: Call, request: Any) -> Any:
        """Makes a silence."""
        silence = pb.Silence()
        silence.CopyFrom(request.silence)
        now_s = self._now()
        silence.silence_id = _silence_id(request.request_id)
        silence.created_by = call.principal.name
        if not silence.HasField("start_time"):
            silence.start_time.FromNanoseconds(int(now_s * 1e9))
        if read_silence(call.tenant, silence.silence_id, silence).end_s <= now_s:
            raise InvalidRequestError([Violation("silence.end_time", "must be in the future")])
        known = await stored(self._documents.silence_messages(call.tenant))
        for _, each in known:
            if each.silence_id == silence.silence_id:
                return pb.CreateSilenceResponse(silence=each)
        old = [
            Document(call.tenant, SILENCE, each.silence_id, b"")
            for _, each in known
            if each.end_time.ToNanoseconds() / 1e9 < now_s - KEPT_S
        ]
        if len(known) - len(old) >= _MAX_SILENCES:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "SILENCES_EXHAUSTED",
                f"tenant {call.tenant} has {len(known):,} silences, the most it may have; those "
                "that are over leave after five days",
            )
        await stored(self._documents.put([silence_document(call.tenant, silence)], old))
        return pb.CreateSilenceResponse(silence=silence)

    async def list_silences(self, call: Call, request: Any) -> Any:
        """Lists silences."""
        masked = read_mask(request, pb.Silence)
        now_s = self._now()
        least_s = now_s - KEPT_S if request.include_expired else now_s
        found = [
            each
            for _, each in await stored(self._documents.silence_messages(call.tenant))
            if each.end_time.ToNanoseconds() / 1e9 > least_s
        ]
        page, token = _page(call, request, found, lambda silence: [silence.silence_id])
        return pb.ListSilencesResponse(
            silences=[masked(each) for each in page], next_page_token=token
        )

    async def expire_silence(self, call: Call, request: Any) -> Any:
        """Ends a silence now."""
        for tenant, each in await stored(self._documents.silence_messages(call.tenant)):
            if each.silence_id == request.silence_id:
                now_ns = int(self._now() * 1e9)
                if each.end_time.ToNanoseconds() > now_ns:
                    each.end_time.FromNanoseconds(now_ns)
                    if each.start_time.ToNanoseconds() >= now_ns:
                        each.start_time.FromNanoseconds(now_ns - 1)
                    await stored(self._documents.put([silence_document(tenant, each)]))
                return pb.ExpireSilenceResponse()
        raise _unknown("SILENCE_UNKNOWN", f"silence {request.silence_id!r}")


def _page(
    call: Call, request: Any, found: Sequence[T], key: Callable[[T], list[Any]]
) -> tuple[Sequence[T], str]:
    """The page of a list in the order of keys, and the token of the next."""
    size = page_size(request.page_size)
    owner = ANY_TENANT if call.all_tenants else call.tenant
    fingerprint = without_page(request)
    position = decode_page_token(owner, fingerprint, request.page_token)
    if position is not None:
        try:
            found = [each for each in found if key(each) > position]
        except TypeError as error:
            raise InvalidRequestError(
                [Violation("page_token", "is not a token of this service")]
            ) from error
    page = found[:size]
    if len(found) <= size:
        return page, ""
    return page, encode_page_token(owner, fingerprint, key(page[-1]))


def _silence_id(request_id: str) -> str:
    if not request_id:
        return str(uuid.uuid4())
    try:
        return str(uuid.UUID(request_id))
    except ValueError as error:
        raise InvalidRequestError([Violation("request_id", "must be a UUID")]) from error


def _unknown(reason: str, what: str) -> MeshError:
    return MeshError(grpc.StatusCode.NOT_FOUND, reason, f"there is no {what}")
