"""The client of the audit service: who did what to which resource."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any, Final, Literal

import grpc
from msgspec import Struct

from agent360.audit.v1 import audit_pb2
from agent360.client.coalescer import Coalescer, Wire
from agent360.client.errors import MeshError, from_rpc_error
from agent360.client.operation import SingleOperation

WIRE: Final = Wire(
    "agent360.audit.v1.AuditService",
    audit_pb2.PipelineRequest,
    audit_pb2.PipelineItem,
    audit_pb2.PipelineResponse,
    audit_pb2.PipelineResult,
)

OutcomeName = Literal["succeeded", "denied", "failed"]

_OUTCOMES: Final = {
    "succeeded": audit_pb2.EVENT_OUTCOME_SUCCEEDED,
    "denied": audit_pb2.EVENT_OUTCOME_DENIED,
    "failed": audit_pb2.EVENT_OUTCOME_FAILED,
}
_MAX_NOTES: Final = 1_000
_LOOK_EVERY_S: Final = 0.05


class AuditEvent(Struct, frozen=True, gc=False):
    """Something that was done."""

    action: str
    """What, such as ``ratelimit.limits.set``."""
    resource: str
    """To what, such as ``limits/requests-per-minute``."""
    actor: str = ""
    """By whom."""
    outcome: OutcomeName = "succeeded"
    """How it ended."""
    attributes: Mapping[str, str] = {}
    """More about it."""
    event_id: str = ""
    """A UUID that makes recording it twice harmless; empty: chosen when it is recorded."""
    time: datetime | None = None
    """When it was done, aware; None: when it is recorded."""


class AuditClient:
    """Records events and lists them.

    Example:
        >>> await mesh.audit.record(AuditEvent("plans.approve", "plans/42", actor="ana"))
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer
        self._notes: set[asyncio.Task[None]] = set()
        self.lost = 0
        """Noted events that could not be recorded."""

    async def record(
        self, event: AuditEvent, *, timeout: float | None = None, tenant: str | None = None
    ) -> str:
        """Records an event; returns its id once it is durable.

        Raises:
            MeshError: the event is not valid, or the service could not be asked.
        """
        return await self._coalescer.call(_Record(event), timeout, tenant)

    def note(self, event: AuditEvent, *, tenant: str | None = None) -> None:
        """Records an event in the background: for what must not wait for its audit record."""
        if len(self._notes) >= _MAX_NOTES:
            self.lost += 1
            return
        task = asyncio.get_running_loop().create_task(self._note(event, tenant))
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def settle(self, grace_s: float) -> None:
        """Waits for noted events, for ``grace_s`` at most and while the service answers."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while self._notes and not self._coalescer.away and loop.time() < end:
            await asyncio.wait(self._notes, timeout=min(_LOOK_EVERY_S, end - loop.time()))
        for task in list(self._notes):
            task.cancel()

    async def list_events(
        self,
        *,
        start: datetime | None = None,
        end: datetime | None = None,
        actor: str = "",
        action: str = "",
        resource: str = "",
        page_size: int = 0,
        fields: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[audit_pb2.Event]:
        """Yields the tenant's events, the newest first.

        Args:
            start: start of the range, included.
            end: end of the range, not included.
            actor: only by this one.
            action: only this.
            resource: only to this.
            page_size: how many to fetch at a time; 0: the service's default.
            fields: only these fields of each; empty: all.
            timeout: seconds for each page.
            tenant: whose events; None: the current scope's, or the Mesh's.
        """
        request = audit_pb2.ListEventsRequest(page_size=page_size)
        if start is not None:
            request.filter.start_time.FromDatetime(start)
        if end is not None:
            request.filter.end_time.FromDatetime(end)
        request.filter.actor, request.filter.action = actor, action
        request.filter.resource = resource
        request.read_mask.paths.extend(fields)
        while True:
            page = await self._coalescer.unary(
                "ListEvents", request, audit_pb2.ListEventsResponse, timeout, tenant
            )
            for event in page.events:
                yield event
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def verify(
        self,
        *,
        first_day: date | None = None,
        last_day: date | None = None,
        anchors: Sequence[audit_pb2.ChainHead] = (),
        tenant: str | None = None,
    ) -> AsyncIterator[audit_pb2.VerifyEventsResponse]:
        """Checks that no event was removed, changed or inserted; yields what it finds, by chain.

        Args:
            first_day: the first UTC day; None: the first there is.
            last_day: the last UTC day; None: today.
            anchors: heads that earlier checks found: the chains must still lead through them.
            tenant: whose events; None: the current scope's, or the Mesh's. ``*``: all tenants',
                for admins.

        Raises:
            MeshError: the caller may not ask for them, or the service could not be asked.
        """
        request = audit_pb2.VerifyEventsRequest(
            first_day=first_day.isoformat() if first_day else "",
            last_day=last_day.isoformat() if last_day else "",
            anchors=anchors,
        )
        responses = await self._coalescer.streaming(
            "VerifyEvents", request, audit_pb2.VerifyEventsResponse, None, tenant, lasting=True
        )
        try:
            async for response in responses:
                yield response
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            responses.cancel()

    async def _note(self, event: AuditEvent, tenant: str | None) -> None:
        try:
            await self.record(event, timeout=5.0, tenant=tenant)
        except MeshError:
            self.lost += 1


class _Record(SingleOperation[str]):
    __slots__ = ("event", "event_id", "now_ns")
    field = "record"
    repeatable = True

    def __init__(self, event: AuditEvent) -> None:
        super().__init__(sum(len(k) + len(v) for k, v in event.attributes.items()) + 512)
        self.event = event
        # Chosen here, so that sending the event again changes nothing.
        self.event_id = event.event_id or str(uuid.uuid4())
        self.now_ns = time.time_ns()

    def fill(self, request: Any) -> None:
        event, message = self.event, request.event
        message.action, message.resource, message.actor = event.action, event.resource, event.actor
        message.outcome = _OUTCOMES[event.outcome]
        message.event_id = self.event_id
        if event.time is None:
            message.event_time.FromNanoseconds(self.now_ns)
        else:
            message.event_time.FromDatetime(event.time)
        if event.attributes:
            message.attributes.update(dict(event.attributes))

    def read(self, response: Any) -> str:
        return str(response.event_id)
