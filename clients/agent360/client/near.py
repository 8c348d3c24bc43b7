"""The near cache: entries that were read lately, in this process, as long as they are true."""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc
from msgspec import Struct

from agent360.client.coalescer import Coalescer
from agent360.client.context import current_scope
from agent360.client.entries import Lookup, Outcome
from agent360.client.errors import MeshError
from agent360.client.near_copies import Copies
from agent360.client.near_tenant import NearTenant
from agent360.client.watching import (
    MAX_SILENCE_S,
    Invalidation,
    is_refusal,
    next_response,
    open_watch,
    pause,
    read_event,
)

_HIT: Final = Outcome.HIT
_IDLE_S: Final = 1.0
"""The watch of a tenant that was asked for within this time is not closed for another's."""
_REFUSED_PAUSE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class NearCache:
    """How much a process may keep near, and for how long.

    Example:
        >>> Mesh.connect(near_cache=NearCache(max_bytes=2**28, namespaces=("plans", "prompts")))
    """

    max_entries: int = 10_000
    """Copies held."""
    max_bytes: int = 64 * 2**20
    """Bytes of all copies, keys and bookkeeping included."""
    max_ttl: float = 60.0
    """Seconds that a copy may be used; never longer than its entry's TTL."""
    namespaces: Sequence[str] = ()
    """Those whose entries are kept near; empty: all."""
    max_tenants: int = 64
    """Tenants whose changes are watched; the least recently used one goes."""
    max_silence: float = MAX_SILENCE_S
    """Seconds without a sign of life after which a watch is broken and its copies are dropped."""
    replica_lag: float = 1.0
    """Seconds that a replica may take to hear of a change that was made through another one."""

    def __post_init__(self) -> None:
        for name in ("max_entries", "max_bytes", "max_ttl", "max_tenants", "max_silence"):
            if not getattr(self, name) > 0:
                raise ValueError(f"near_cache.{name} must be above zero")
        if self.replica_lag < 0:
            raise ValueError("near_cache.replica_lag must not be negative")
        if isinstance(self.namespaces, str):
            raise ValueError("near_cache.namespaces must be a sequence of names")  # noqa: TRY004


class NearStats(Struct, frozen=True, gc=False):
    """What a near cache did so far, and holds now; every count is exact."""

    hits: int = 0
    """Lookups answered near."""
    misses: int = 0
    """Lookups that might have been, and went to the service."""
    stored: int = 0
    """Copies taken in."""
    evictions: int = 0
    """Copies pushed out for want of room."""
    expired: int = 0
    """Copies whose time was over when they were met."""
    invalidated: int = 0
    """Copies dropped because they were, or might have been, outdated."""
    entries: int = 0
    """Copies held."""
    bytes: int = 0
    """Bytes of the copies held, keys and bookkeeping included."""


class Near:
    """Answers lookups from copies and keeps these true; it never makes a call fail.

    Example:
        >>> found = near.find("acme", "plans", "plan:42")
        >>> if found is None:
        ...     sent = near.now()
        ...     near.keep("acme", "plans", "plan:42", lookup, lookup.tags, sent)
    """

    def __init__(
        self,
        coalescer: Coalescer,
        options: NearCache,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an empty near cache; a tenant's watch is opened by the first lookup.

        Args:
            coalescer: of the cache service.
            options: bounds.
            now: the time, on the clock of the event loop.
        """
        self._coalescer = coalescer
        self._options = options
        self._namespaces = frozenset(options.namespaces)
        self._copies = Copies(options.max_entries, options.max_bytes)
        self._tenants: dict[str, NearTenant] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._default_tenant = coalescer.tenant
        self._hits = 0
        self._misses = 0
        self._closed = False
        self.now = now
        """The time."""

    def tenant_of(self, tenant: str | None) -> str:
        """On whose behalf a call is made."""
        if tenant is not None:
            return tenant
        return current_scope().tenant or self._default_tenant

    def covers(self, namespace: str) -> bool:
        """Whether the entries of a namespace are kept near."""
        return not self._namespaces or namespace in self._namespaces

    def find(
        self,
        tenant: str,
        namespace: str,
        key: str,
        include_tags: bool = False,
        fresh_s: float = 0.0,
    ) -> Lookup | None:
        """Answers a lookup; None where the service must be asked.

        Args:
            tenant: on whose behalf.
            namespace: of the entry.
            key: of the entry.
            include_tags: whether the entry's tags are wanted.
            fresh_s: how much of the entry's TTL must remain, in seconds.
        """
        if self._namespaces and namespace not in self._namespaces:
            return None
        now = self.now()
        found = self._tenants.get(tenant)
        if found is None:
            self._misses += 1
            self._begin(tenant, now)
            return None
        found.used = now
        copy = found.find(namespace, key, now)
        if copy is None:
            self._misses += 1
            return None
        remaining_s = copy.fresh_until - now
        tags = copy.tags
        if remaining_s < fresh_s or (include_tags and tags is None):
            self._misses += 1
            return None
        self._hits += 1
        return Lookup(
            _HIT,
            copy.value,
            copy.content_type,
            copy.version,
            remaining_s,
            tags if include_tags and tags is not None else (),
            False,
            False,
        )

    def peek(self, tenant: str, namespace: str, key: str) -> Lookup | None:
        """Answers a lookup; None where only ``find`` can tell, which then counts it."""
        found = self._tenants.get(tenant)
        if found is None or not self.covers(namespace):
            return None
        now = self.now()
        found.used = now
        copy = found.find(namespace, key, now)
        if copy is None:
            return None
        self._hits += 1
        remaining_s = copy.fresh_until - now
        return Lookup(
            _HIT, copy.value, copy.content_type, copy.version, remaining_s, (), False, False
        )

    def keep(
        self,
        tenant: str,
        namespace: str,
        key: str,
        lookup: Lookup,
        tags: tuple[str, ...] | None,
        sent: float,
    ) -> None:
        """Takes a copy of an answer in, if nothing speaks against it.

        Args:
            tenant: on whose behalf.
            namespace: of the entry.
            key: of the entry.
            lookup: the answer.
            tags: of the entry; None: not known.
            sent: when it was asked for.
        """
        found = self._tenants.get(tenant)
        if found is not None and self.covers(namespace):
            found.keep(namespace, key, lookup, tags, sent, self.now())

    def note_write(self, tenant: str, namespace: str, key: str, version: int = 0) -> None:
        """This process wrote or removed an entry.

        Args:
            tenant: on whose behalf.
            namespace: of the entry.
            key: of the entry.
            version: of the entry now in place; 0: not known, or there is none.
        """
        found = self._tenants.get(tenant)
        if found is not None and self.covers(namespace):
            found.note_write(namespace, key, version, self.now())

    def note_invalidation(self, tenant: str, event: Invalidation) -> None:
        """This process asked for an invalidation."""
        found = self._tenants.get(tenant)
        if found is not None and self.covers(event.namespace):
            found.note_invalidation(event, self.now())

    @property
    def stats(self) -> NearStats:
        """What was done so far, and is held now."""
        copies = self._copies
        return NearStats(
            self._hits,
            self._misses,
            copies.stored,
            copies.evictions,
            copies.expired,
            copies.invalidated,
            copies.entries,
            copies.size_bytes,
        )

    async def close(self) -> None:
        """Ends all watches; nothing is answered near any more."""
        self._closed = True
        for tenant in list(self._tenants.values()):
            self._end(tenant)
        if self._tasks:
            await asyncio.wait(self._tasks)

    # ---------------------------------------------------------------- watching

    def _begin(self, name: str, now: float) -> None:
        """Begins to watch a tenant, if there is room for one more."""
        if self._closed:
            return
        options = self._options
        if len(self._tenants) >= options.max_tenants:
            oldest = min(self._tenants.values(), key=lambda each: each.used)
            if now - oldest.used < _IDLE_S:
                return
            self._end(oldest)
        tenant = self._tenants[name] = NearTenant(
            name,
            self._copies,
            max_ttl_s=options.max_ttl,
            lag_s=options.replica_lag,
            max_silence_s=options.max_silence,
        )
        tenant.used = now
        # In an empty context: what is watched for all must not carry the first caller's trace.
        task = asyncio.get_running_loop().create_task(
            self._attend(tenant), context=contextvars.Context()
        )
        tenant.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, tenant: NearTenant) -> None:
        del self._tenants[tenant.name]
        tenant.lose()
        if tenant.task is not None:
            tenant.task.cancel()

    async def _attend(self, tenant: NearTenant) -> None:
        """Keeps a tenant's watch open until it is cancelled."""
        failures = 0
        while True:
            try:
                call = await open_watch(self._coalescer, self._options.namespaces, tenant.name)
                try:
                    while True:
                        response = await next_response(call, self._options.max_silence)
                        tenant.hear(read_event(response), self.now())
                        failures = 0
                finally:
                    tenant.lose()
                    call.cancel()
            except MeshError as error:
                failures += 1
                if is_refusal(error) or error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    await asyncio.sleep(_REFUSED_PAUSE_S)
                    continue
            await pause(failures)
