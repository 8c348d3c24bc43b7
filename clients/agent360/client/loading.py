"""Loading what is missing: one load at a time over all processes, shared by who waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc

from agent360.client.cache_operations import ClaimOperation
from agent360.client.coalescer import Coalescer
from agent360.client.context import current_scope, enter_scope
from agent360.client.entries import Entry, Lookup
from agent360.client.entry_client import DEFAULT_NAMESPACE, EntryClient
from agent360.client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    MeshError,
    RateLimitedError,
)
from agent360.client.lane import client_closed
from agent360.client.near import Near
from agent360.client.serializers import UNCHANGED, Serializer

T = TypeVar("T")

_log: Final = logging.getLogger("agent360.client.cache")

_FILL_PATIENCE_S: Final = 1.0
"""How long a value that was loaded is withheld until it is stored."""
_SHORTEST_CLAIM_S: Final = 0.1
_UNDECODABLE: Final[Any] = object()
_AWAY: Final = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@dataclass(frozen=True, slots=True)
class _Order(Generic[T]):
    """What is to be loaded, and how it is to be stored."""

    tenant: str
    namespace: str
    key: str
    load: Callable[[], Awaitable[T]]
    serializer: Serializer[T]
    ttl: float | None
    stale_ttl: float | None
    content_type: str
    tags: Sequence[str]
    allow_stale: bool
    eager_refresh: float | None
    fill_timeout: float | None
    claim_s: float
    """How long to wait for what another process loads."""

    async def loaded(self) -> T:
        """The value, from the caller's own function."""
        try:
            return await self.load()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise MeshError(
                grpc.StatusCode.CANCELLED, "LOAD_CANCELLED", f"loading {self.key!r} was cancelled"
            ) from None

    def entry(self, value: T) -> Entry:
        """The entry of a value."""
        encoded = self.serializer.encode(value)
        return Entry(self.key, encoded, self.ttl, self.stale_ttl, self.content_type, self.tags)

    def decoded(self, lookup: Lookup) -> T:
        """The value of an entry; ``_UNDECODABLE`` if it is not of the type, as of an older form."""
        try:
            return self.serializer.decode(lookup.value)
        except Exception:  # noqa: BLE001 - whatever a serializer raises, the entry is of no use
            undecodable: T = _UNDECODABLE
            return undecodable


class LoadingClient(EntryClient):
    """Entries that are loaded where they are missing.

    Invariant: there is one flight at most for a key; it belongs to no caller, and ends by itself.
    """

    def __init__(self, coalescer: Coalescer, near: Near | None = None) -> None:
        super().__init__(coalescer, near)
        self._flights: dict[tuple[object, ...], asyncio.Task[Any]] = {}
        self._background: set[asyncio.Task[Any]] = set()

    async def get_or_load(
        self,
        key: str,
        load: Callable[[], Awaitable[T]],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        allow_stale: bool = True,
        eager_refresh: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        fill_timeout: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> T:
        """Reads a value or, where it is missing, loads and stores it.

        Of all callers in all processes one loads; the others get its value. Those of this process
        share one flight, and get the same object: treat it as read-only. A stale value, or one that
        is to be refreshed early, is returned at once and loaded anew in the background. If the
        cache cannot be reached the value is loaded and not stored.

        Example:
            >>> await mesh.cache.get_or_load("plan:42", lambda: read_plan(42), ttl=60)
            b'...'

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            load: gives the value. It runs with the context variables of the first caller, but
                without its deadline, and goes on if callers leave.
            namespace: groups keys.
            ttl: seconds that the entry is fresh; None: the service's default.
            stale_ttl: seconds after its TTL that it may be served stale.
            allow_stale: whether a stale value may be returned while it is loaded anew.
            eager_refresh: part of its TTL, above 0 and below 1, after which a fresh value is
                loaded anew in the background; None: as the namespace's policy says.
            serializer: of the value; by default it is bytes.
            content_type: media type of the value; None: the serializer's.
            tags: labels for ``invalidate``.
            fill_timeout: seconds that loading may take before another process may load as well.
            timeout: seconds that this caller waits; None: what remains in the current scope, or as
                long as it takes.
            tenant: as in ``get``.

        Raises:
            DeadlineExceededError: the time was over; the flight goes on.
            MeshError: the request is not valid.
            Exception: whatever ``load`` raised, unless the service has a value to stand in.
        """
        scope = current_scope()
        if tenant is None:
            tenant = scope.tenant or self._coalescer.tenant
        near = self._near
        if near is not None:
            fresh_s = (1.0 - eager_refresh) * ttl if eager_refresh and ttl else 0.0
            found = near.find(tenant, namespace, key, fresh_s=fresh_s)
            if found is not None:
                try:
                    return serializer.decode(found.value)
                except Exception:  # noqa: BLE001 - the flight finds it again, and loads anew
                    _log.debug("the near copy of %r cannot be decoded", key)
        remaining_s = _remaining(scope.deadline, timeout)
        name = (tenant, namespace, key, allow_stale, id(serializer))
        flight = self._flights.get(name)
        if flight is None:
            claim_s = self._coalescer.default_timeout_s + (fill_timeout or 0.0)
            if remaining_s is not None:
                claim_s = max(_SHORTEST_CLAIM_S, min(claim_s, remaining_s / 2))
            order = _Order(
                tenant,
                namespace,
                key,
                load,
                serializer,
                ttl,
                stale_ttl,
                serializer.content_type if content_type is None else content_type,
                tags,
                allow_stale,
                eager_refresh,
                fill_timeout,
                claim_s,
            )
            flight = self._begin(name, order)
        # Waiting in this way leaves the flight alone when its waiter is cancelled.
        await asyncio.wait((flight,), timeout=remaining_s)
        if not flight.done():
            raise DeadlineExceededError("the deadline passed before the value was loaded")
        if flight.cancelled():
            raise client_closed()
        value: T = flight.result()
        return value

    async def settle(self, grace_s: float) -> None:
        """Ends what runs in the background; flights have ``grace_s`` to end by themselves."""
        if self._near is not None:
            await self._near.close()
        until = time.monotonic() + grace_s
        while (running := self._running()) and (left_s := until - time.monotonic()) > 0:
            await asyncio.wait(running, timeout=left_s)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=1.0)

    def abandon(self, fill_token: str, tenant: str | None) -> None:
        """Gives a claim up in the background: its filler was cancelled."""
        error = MeshError(grpc.StatusCode.CANCELLED, "LOAD_CANCELLED", "loading was cancelled")
        self._spawn(self._abandon(fill_token, error, tenant))

    # ---------------------------------------------------------------- flights

    async def _abandon(self, fill_token: str, error: MeshError, tenant: str | None) -> None:
        with suppress(MeshError):
            await self.fail(fill_token, error, tenant=tenant)

    def _running(self) -> list[asyncio.Task[Any]]:
        tasks = (*self._flights.values(), *self._background)
        return [task for task in tasks if not task.done()]

    def _begin(self, name: tuple[object, ...], order: _Order[T]) -> asyncio.Task[T]:
        task = asyncio.create_task(self._fly(order))
        self._flights[name] = task

        def land(task: asyncio.Task[T]) -> None:
            del self._flights[name]
            if not task.cancelled():
                task.exception()  # every waiter may have left: nobody asks for it then

        task.add_done_callback(land)
        return task

    async def _fly(self, order: _Order[T]) -> T:
        enter_scope(current_scope()._replace(deadline=None))
        operation = ClaimOperation(
            order.namespace, order.key, order.allow_stale, order.fill_timeout, order.eager_refresh
        )
        try:
            claim = await self._claim(operation, order.claim_s, order.tenant)
        except MeshError as error:
            if not _is_away(error):
                raise
            return await order.loaded()
        token = claim.fill_token
        if claim.lookup.hit:
            value = order.decoded(claim.lookup)
            if value is not _UNDECODABLE:
                if token:
                    self._spawn(self._refresh(order, token))
                return value
            if not token:
                return await self._replace(order, claim.lookup.version)
        if not token:
            return await order.loaded()
        return await self._load_and_fill(order, token)

    async def _load_and_fill(self, order: _Order[T], token: str) -> T:
        try:
            value = await order.loaded()
            entry = order.entry(value)
        except Exception as error:
            fallback = await self._give_up(order, token, error)
            if fallback is not None and fallback.hit:
                stale = order.decoded(fallback)
                if stale is not _UNDECODABLE:
                    return stale
            raise
        await asyncio.wait(
            (self._spawn(self._fill(order, token, entry)),), timeout=_FILL_PATIENCE_S
        )
        return value

    async def _refresh(self, order: _Order[T], token: str) -> None:
        """Loads in the background what was returned already."""
        try:
            await self._load_and_fill(order, token)
        except Exception:  # noqa: BLE001 - whatever it was, nobody waits for it
            _log.exception("%r could not be loaded anew", order.key)

    async def _replace(self, order: _Order[T], version: int) -> T:
        """Loads what is there in a form that cannot be decoded, unless it is written meanwhile."""
        value = await order.loaded()
        entry = order.entry(value)
        try:
            await self.set(
                entry.key,
                entry.value,
                namespace=order.namespace,
                ttl=entry.ttl,
                stale_ttl=entry.stale_ttl,
                content_type=entry.content_type,
                tags=entry.tags,
                if_version=version,
                tenant=order.tenant,
            )
        except MeshError as error:
            _log.warning("%r was loaded and could not be stored: %s", order.key, error)
        return value

    async def _fill(self, order: _Order[T], token: str, entry: Entry) -> None:
        try:
            await self.fill(
                token,
                entry.key,
                entry.value,
                namespace=order.namespace,
                ttl=entry.ttl,
                stale_ttl=entry.stale_ttl,
                content_type=entry.content_type,
                tags=entry.tags,
                tenant=order.tenant,
            )
        except MeshError as error:
            _log.warning("%r was loaded and could not be stored: %s", order.key, error)
            if not _is_away(error):
                await self._give_up(order, token, error)

    async def _give_up(self, order: _Order[T], token: str, error: Exception) -> Lookup | None:
        """Tells the service that loading failed; returns what it serves instead, if anything."""
        try:
            return await self.fail(token, load_failed(error), tenant=order.tenant)
        except MeshError:
            return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def load_failed(error: Exception) -> MeshError:
    """What the service is told of an error of the caller's own: its kind, and nothing private."""
    if isinstance(error, MeshError):
        return error
    return MeshError(
        grpc.StatusCode.UNKNOWN, "LOAD_FAILED", f"loading failed with {type(error).__name__}"
    )


def _is_away(error: MeshError) -> bool:
    """Whether the cache is of no help at present, rather than the request at fault."""
    if isinstance(error, InvalidRequestError | RateLimitedError):
        return False
    return error.code in _AWAY and error.reason != "CLIENT_CLOSED"


def _remaining(deadline: float | None, timeout: float | None) -> float | None:
    """Seconds that a caller may wait; None: as long as it takes."""
    remaining_s = timeout
    if deadline is not None:
        left_s = deadline - time.monotonic()
        remaining_s = left_s if timeout is None else min(left_s, timeout)
    if remaining_s is not None and remaining_s <= 0:
        raise DeadlineExceededError("the deadline had passed before the call was made")
    return remaining_s
