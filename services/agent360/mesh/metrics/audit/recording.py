"""Records events: those that wait while others are being stored are stored together."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import grpc
import structlog

from agent360.client.errors import MeshError
from agent360.mesh.metrics.audit.chain import DAY_S, day_of, link, successor
from agent360.mesh.metrics.ports import (
    Append,
    AuditEvent,
    ChainedEvent,
    ChainHead,
    ChainKey,
    ConflictError,
    EventStore,
    StoreError,
)

_GROUP: Final = 1_000
_MAX_WAITING: Final = 20_000
_MAX_HEADS: Final = 10_000
_ATTEMPTS: Final = 3
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_FAREWELL_S: Final = 5.0


class _Waiting(NamedTuple):
    events: Sequence[AuditEvent]
    done: asyncio.Future[None]


class Recorder:
    """The only one that appends for its writer; knows the heads of the chains it appends to.

    Invariant: an append whose end is not known is repeated unchanged before the next. Meanwhile
    events are refused: so nobody waits for a store that is away.

    Example:
        >>> recorder = Recorder(stores.events, journal.writer, keep_days=None, log=log)
        >>> recorder.start()
        >>> await recorder.record([event])
        >>> await recorder.close()
    """

    def __init__(
        self,
        store: EventStore,
        writer: str,
        *,
        keep_days: int | None,
        log: structlog.stdlib.BoundLogger,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Makes a recorder.

        Args:
            store: where events go.
            writer: names this replica's chains; no other process uses it at the same time.
            keep_days: how long events are kept beside the day they were recorded on; None: for
                ever.
            log: told when the store fails.
            now: Unix time.
        """
        self._store = store
        self._writer = writer
        self._keep_days = keep_days
        self._log = log
        self._now = now
        self._waiting: deque[_Waiting] = deque()
        self._count = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._heads: OrderedDict[str, ChainHead] = OrderedDict()
        self._storing: Sequence[_Waiting] = ()
        self._failing = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to store."""
        self._task = asyncio.create_task(self._run())

    async def record(self, events: Sequence[AuditEvent]) -> None:
        """Records events; durable when it returns. Those whose ids are known change nothing.

        Raises:
            MeshError: UNAVAILABLE; they may or may not be recorded. May be repeated.
        """
        while self._count >= _MAX_WAITING and not self._failing and not self._closing:
            self._room.clear()
            await self._room.wait()
        if self._failing:
            raise _unavailable()
        if self._closing or self._task is None:
            raise MeshError(grpc.StatusCode.UNAVAILABLE, "STOPPING", "the service is stopping")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(events, done))
        self._count += len(events)
        self._wake.set()
        # Shielded: what a caller gives up on is stored all the same, together with the others'.
        await asyncio.shield(done)

    async def expire(self) -> None:
        """Drops the days that are past their retention.

        Raises:
            StoreError: it is to be repeated.
        """
        if self._keep_days is not None:
            await self._store.drop_days(day_of(self._now()) - self._keep_days)

    async def close(self) -> None:
        """Stores what waits; gives up on a store that is away."""
        self._closing = True
        self._wake.set()
        self._room.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=_FAREWELL_S)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._refuse_all()

    # ---------------------------------------------------------------- the one task

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                if self._closing:
                    return
                self._wake.clear()
                await self._wake.wait()
            group = self._storing = self._take()
            try:
                await self._store_group([event for one in group for event in one.events])
            except StoreError as error:
                if not self._failing:
                    self._log.error("audit events were not stored", error=str(error))
                _refuse(group)
            except asyncio.CancelledError:
                _refuse(group)
                raise
            except Exception:  # noqa: BLE001 - it is logged; callers are told
                # A bug must not end the one task that stores: whoever comes later would wait.
                self._log.exception("audit events were not stored")
                _refuse(group)
            for one in group:
                if not one.done.done():
                    one.done.set_result(None)

    def _take(self) -> list[_Waiting]:
        group = [self._waiting.popleft()]
        size = len(group[0].events)
        while self._waiting and size + len(self._waiting[0].events) <= _GROUP:
            group.append(self._waiting.popleft())
            size += len(group[-1].events)
        self._count -= size
        self._room.set()
        return group

    async def _store_group(self, events: Sequence[AuditEvent]) -> None:
        """Stores those that are not known yet.

        Raises:
            StoreError: nothing was stored.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            fresh = {(event.tenant, event.event_id): event for event in reversed(events)}
            for known in await self._store.known(list(fresh)):
                del fresh[known]
            if not fresh:
                return
            # As reversed once: of two with one id the first counts, and the order is the callers'.
            append = await self._link(list(reversed(fresh.values())))
            try:
                await self._append(append)
            except ConflictError as error:
                self._heads.clear()
                self._log.error("a place in an audit chain is taken", error=str(error))
                if attempt == _ATTEMPTS:
                    raise
                continue
            for head in append.heads:
                self._heads[head.chain.tenant] = head
                self._heads.move_to_end(head.chain.tenant)
            while len(self._heads) > _MAX_HEADS:
                self._heads.popitem(last=False)
            return

    async def _link(self, events: Sequence[AuditEvent]) -> Append:
        by_tenant: dict[str, list[AuditEvent]] = {}
        for event in events:
            by_tenant.setdefault(event.tenant, []).append(event)
        unknown = [tenant for tenant in by_tenant if tenant not in self._heads]
        if unknown:
            self._heads.update(await self._store.heads(unknown, self._writer))
        day = day_of(self._now())
        linked: list[ChainedEvent] = []
        heads = []
        for tenant, own in by_tenant.items():
            key = ChainKey(tenant, day, self._writer)
            rows, head = link(successor(self._heads.get(tenant), key), own)
            linked += rows
            heads.append(head)
        keep = self._keep_days
        return Append(linked, heads, None if keep is None else (day + 1 + keep) * DAY_S)

    async def _append(self, append: Append) -> None:
        """Appends; repeats it until it is done.

        Raises:
            ConflictError: it cannot be.
        """
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._store.append(append)
            except ConflictError:
                self._failing = False
                raise
            except StoreError as error:
                if not self._failing:
                    self._log.error(
                        "audit events cannot be stored; it is repeated", error=str(error)
                    )
                self._failing = True
                self._refuse_all()
                if self._closing:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            else:
                if self._failing:
                    self._log.info("audit events are stored again")
                self._failing = False
                return

    def _refuse_all(self) -> None:
        """Fails those whose events are being stored and those that wait."""
        waiting, self._waiting = self._waiting, deque()
        self._count = 0
        self._room.set()
        _refuse((*self._storing, *waiting))


def _refuse(group: Sequence[_Waiting]) -> None:
    for one in group:
        if not one.done.done():
            one.done.set_exception(_unavailable())
            one.done.exception()  # whoever gave up on it does not look any more


def _unavailable() -> MeshError:
    return MeshError(
        grpc.StatusCode.UNAVAILABLE,
        "AUDIT_STORE_FAILING",
        "events cannot be stored now, the service's log says why; repeat with the same event_id",
        retry_after_s=1.0,
    )
