"""The RPCs of AuditService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Final, TypeVar

import grpc

from agent360.audit.v1 import audit_pb2 as pb
from agent360.client.errors import InvalidRequestError, MeshError
from agent360.mesh.metrics.audit.recording import Recorder
from agent360.mesh.metrics.audit.verifying import Verifier
from agent360.mesh.metrics.audit.wire import (
    checked_message,
    event_message,
    read_check,
    read_event,
    read_filter,
)
from agent360.mesh.metrics.ports import AuditEvent, EventStore, Position, StoreError
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.pages import (
    decode_place,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.redaction import Redactor

T = TypeVar("T")

DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["AuditService"]
"""In the contract."""


class AuditService:
    """Records events, lists and verifies them.

    Example:
        >>> service = AuditService(stores.events, recorder, redactor)
        >>> await service.list_events(call, pb.ListEventsRequest())
    """

    def __init__(self, store: EventStore, recorder: Recorder, redactor: Redactor) -> None:
        self._store = store
        self._recorder = recorder
        self._redactor = redactor
        self._verifier = Verifier(store)

    async def record(self, items: Sequence[Item], emit: Emit) -> None:
        """Records a batch of events; all of it becomes durable together."""
        events: list[AuditEvent] = []
        good: list[Item] = []
        for item in items:
            try:
                events.append(read_event(item.call, item.request, self._redactor))
            except InvalidRequestError as error:
                emit.fail(item, error)
            else:
                good.append(item)
        if not good:
            return
        try:
            await self._recorder.record(events)
        except MeshError as error:
            for item in good:
                emit.fail(item, error)
            return
        for item, event in zip(good, events, strict=True):
            emit.reply(item).event_id = event.event_id

    async def list_events(self, call: Call, request: Any) -> Any:
        """Lists events, the newest first."""
        size = page_size(request.page_size)
        wanted = read_filter(call.tenant, request)
        query = request.filter.SerializeToString(deterministic=True)
        position = decode_place(call.tenant, query, request.page_token)
        masked = read_mask(request, pb.Event)
        before = Position(*position) if position else None
        page = await _stored(self._store.events(wanted, before, size))
        response = pb.ListEventsResponse()
        for row in page.events:
            response.events.append(masked(event_message(row)))
        if page.resume is not None:
            response.next_page_token = encode_page_token(call.tenant, query, list(page.resume))
        return response

    async def verify_events(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Checks chains; answers for each."""
        check = read_check(call, request)
        chains = self._verifier.verify(*check)
        while (checked := await _stored(anext(chains, None))) is not None:
            yield checked_message(checked)


async def _stored(work: Awaitable[T]) -> T:
    """What reads the store; it may be away."""
    try:
        return await work
    except StoreError as error:
        raise MeshError(
            grpc.StatusCode.UNAVAILABLE,
            "STORE_AWAY",
            "events cannot be read now, as the store is away; repeat later",
            retry_after_s=1.0,
        ) from error
