"""The cache service's domain: entries, claims and changes of many tenants."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import Final, NamedTuple

from agent360.client.errors import InvalidRequestError, Violation
from agent360.mesh.cache.claims import Claim, Claims, Grant
from agent360.mesh.cache.entry import Entry, Payload, Space, size_of
from agent360.mesh.cache.journal import Change, Journal, Journals
from agent360.mesh.cache.ports import AuditTrail, Clock, Store

_SLICE: Final = 5_000
_SWEEP_SLICE: Final = 1_000
_SWEEP_EVERY_S: Final = 1.0


class Condition(Enum):
    """When a write takes effect."""

    ALWAYS = auto()
    """Whatever is there."""
    IF_ABSENT = auto()
    """If the key has no fresh entry."""
    IF_VERSION = auto()
    """If the entry there has the version; version 0 stands for no entry."""


class Stored(NamedTuple):
    """What became of a write."""

    stored: bool
    """Whether it took effect and the entry is held."""
    version: int
    """Version of the entry now in place; 0 if there is none."""


class Claimed(NamedTuple):
    """What a claim found or gave."""

    entry: Entry | None
    """The entry: fresh, or stale where that is allowed."""
    grant: Grant | None
    """The right, and the duty, to fill the key."""


class Limits(NamedTuple):
    """Bounds of the service."""

    max_value_bytes: int
    """Largest value."""
    max_entry_bytes: int
    """Largest entry, bookkeeping included: what the store could hold if it held nothing else."""
    max_claims: int = 50_000
    """Open claims."""
    journal_size: int = 4_096
    """Changes remembered for each tenant."""
    max_watches: int = 256
    """Open watches of one tenant."""


class CacheService:
    """Reads, writes and invalidates entries; decides who fills a missing one.

    Everything but ``wait``, ``invalidate_*`` and ``run_sweeper`` answers at once. Methods take the
    time from ``now``, which the caller reads once for a batch.

    Invariant: an entry is written before the journal says so and before waiters are answered, so
    that whoever acts on either finds it.

    Example:
        >>> service = CacheService(store, clock, Limits(2**20, 2**20), audit)
        >>> space = service.space("acme", "plans")
        >>> service.write(space, "plan:42", Payload(b"...", ttl_s=60.0), clock.now())
        Stored(stored=True, version=1764000000000000)
        >>> service.find(space, "plan:42", clock.now()).value
        b'...'
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        limits: Limits,
        audit: AuditTrail,
        new_token: Callable[[], str] = lambda: secrets.token_urlsafe(18),
    ) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits
        self._audit = audit
        self._claims = Claims(clock, new_token, limits.max_claims)
        self._journals = Journals(limits.journal_size, new_token, limits.max_watches)
        self._last_version = 0
        self.space = store.space
        """The namespace of a tenant; see ``Store.space``."""
        self.space_to_read = store.space_to_read
        """The same for lookups alone; see ``Store.space_to_read``."""
        self.find = store.find
        """The entry that answers a lookup; see ``Store.find``."""
        self.note_reads = store.note_reads
        """To be called once for a batch of lookups; see ``Store.note_reads``."""

    # ---------------------------------------------------------------- writing

    def write(
        self,
        space: Space,
        key: str,
        payload: Payload,
        now: float,
        condition: Condition = Condition.ALWAYS,
        if_version: int = 0,
    ) -> Stored:
        """Writes an entry if the condition holds.

        A claim of the key ends: who waits gets what was written, and the filler's value, which was
        loaded before, comes too late.

        Raises:
            InvalidRequestError: the entry is too large.
        """
        self._check_size(key, payload)
        if condition is not Condition.ALWAYS:
            there = self._store.peek(space, key, now)
            version = 0 if there is None else there.version
            if condition is Condition.IF_ABSENT:
                holds = there is None or now >= there.fresh_until
            else:
                holds = version == if_version
            if not holds:
                return Stored(False, version)
        entry = self._put(space, key, payload, now)
        claim = self._claims.find(space, key)
        if claim is not None:
            self._claims.settle(claim, entry)
        return _stored(entry)

    def delete(self, space: Space, key: str, now: float) -> bool:
        """Removes an entry; returns whether there was one."""
        entry = self._store.peek(space, key, now)
        if entry is not None:
            self._store.remove(entry)
        self._claims.outdate(space, key.__eq__)
        self._changed(Change(space.name, "keys", (key,), self._next_version()), space)
        return entry is not None

    # ---------------------------------------------------------------- claims

    def claim(
        self, space: Space, key: str, allow_stale: bool, fill_timeout_s: float, now: float
    ) -> Claimed | Claim:
        """Finds an entry, claims the right to fill it, or returns the claim to wait for.

        Raises:
            MeshError: too many claims are open.
        """
        entry = self._store.find(space, key, now, allow_stale)
        if entry is not None and now < entry.fresh_until:
            return Claimed(entry, None)
        claim = self._claims.find(space, key)
        if claim is None:
            return Claimed(entry, self._claims.open(space, key, fill_timeout_s))
        if entry is not None:
            return Claimed(entry, None)
        return claim

    async def wait(self, claim: Claim, fill_timeout_s: float) -> Claimed:
        """Waits until the key is filled, or until the claim falls to the caller."""
        result = await self._claims.wait(claim, fill_timeout_s)
        if isinstance(result, Grant):
            return Claimed(None, result)
        return Claimed(result, None)

    def fill(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload, now: float
    ) -> Stored:
        """Stores what a claim asked for and answers who waits.

        The value is discarded if the token has expired, or if the key was written or invalidated
        since the claim: it may be older than that.

        Raises:
            InvalidRequestError: the entry is too large, or is not the one that was claimed.
        """
        self._check_size(key, payload)
        claim = self._claims.redeem(token, tenant)
        if claim is None:
            there = self._store.spaces(tenant).get(namespace)
            entry = None if there is None else self._store.peek(there, key, now)
            return Stored(False, 0 if entry is None else entry.version)
        if claim.space.name != namespace or claim.key != key:
            field = "entry.key" if claim.space.name == namespace else "entry.namespace"
            raise InvalidRequestError([Violation(field, "is not what the token claims")])
        if not claim.void_tags.isdisjoint(payload.tags):
            self._claims.pass_on(claim)
            return Stored(False, 0)
        counts = claim.space.counts
        counts.fills += 1
        counts.fill_time_s += now - claim.began
        entry = self._put(claim.space, key, payload, now)
        self._claims.settle(claim, entry)
        return _stored(entry)

    def give_up(self, tenant: str, token: str) -> None:
        """The filler failed: the next caller that waits gets the claim."""
        claim = self._claims.redeem(token, tenant)
        if claim is not None:
            self._claims.pass_on(claim)

    # ---------------------------------------------------------------- invalidation

    def invalidate_keys(self, space: Space, keys: Sequence[str], now: float) -> int:
        """Removes entries by key; returns how many there were."""
        removed = 0
        for key in dict.fromkeys(keys):
            entry = self._store.peek(space, key, now)
            if entry is not None:
                self._store.remove(entry)
                removed += 1
        self._claims.outdate(space, frozenset(keys).__contains__)
        change = Change(space.name, "keys", tuple(keys), self._next_version())
        self._invalidated(space, change, removed)
        return removed

    async def invalidate_prefix(self, space: Space, prefix: str) -> int:
        """Removes the entries whose keys begin with a prefix; returns how many there were."""
        version = self._next_version()
        self._claims.outdate(space, lambda key: key.startswith(prefix))
        entries = space.entries
        found = (entries.get(key) if key.startswith(prefix) else None for key in list(entries))
        removed = await self._remove_in_slices(found, version)
        self._invalidated(space, Change(space.name, "prefix", (prefix,), version), removed)
        return removed

    async def invalidate_tags(self, space: Space, tags: Sequence[str]) -> int:
        """Removes the entries with any of the tags; returns how many there were."""
        version = self._next_version()
        self._claims.outdate_tags(space, tags)
        found = self._store.tagged(space, tags)
        removed = await self._remove_in_slices(found, version)
        self._invalidated(space, Change(space.name, "tags", tuple(tags), version), removed)
        return removed

    def invalidate_all(self, space: Space) -> None:
        """Moves a namespace to its next version, in the same time however many entries it has."""
        self._store.drop_generation(space)
        self._claims.outdate(space, lambda _: True)
        self._invalidated(space, Change(space.name, "all", (), self._next_version()), 0)

    # ---------------------------------------------------------------- watching and counting

    def watch(self, tenant: str) -> Journal:
        """The tenant's changes.

        Raises:
            MeshError: too many watch them.
        """
        return self._journals.to_watch(tenant)

    def spaces(self, tenant: str) -> Mapping[str, Space]:
        """The tenant's namespaces by name."""
        return self._store.spaces(tenant)

    async def sweep(self) -> None:
        """Lets go of everything that is over."""
        while self._store.sweep(self._clock.now(), _SWEEP_SLICE):  # noqa: ASYNC110 - a pause
            await asyncio.sleep(0)

    async def run_sweeper(self) -> None:
        """Sweeps for ever, once a second."""
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            await self.sweep()

    def close(self) -> None:
        """Ends all claims."""
        self._claims.close()

    # ---------------------------------------------------------------- within

    def _put(self, space: Space, key: str, payload: Payload, now: float) -> Entry:
        version = self._next_version()
        entry = self._store.write(space, key, payload, now, version)
        self._changed(Change(space.name, "keys", (key,), version - 1), space)
        return entry

    async def _remove_in_slices(self, entries: Iterable[Entry | None], version: int) -> int:
        """Removes entries not newer than ``version``, pausing so that others are served."""
        removed = 0
        for count, entry in enumerate(entries, 1):
            if (
                entry is not None
                and entry.version <= version
                and entry.segment is not None
                and entry.reachable
            ):
                self._store.remove(entry)
                removed += 1
            if not count % _SLICE:
                await asyncio.sleep(0)
        return removed

    def _check_size(self, key: str, payload: Payload) -> None:
        size, largest = len(payload.value), self._limits.max_value_bytes
        if size > largest:
            raise InvalidRequestError(
                [Violation("entry.value", f"must be at most {largest:,} bytes, is {size:,}")]
            )
        if size_of(key, payload) > self._limits.max_entry_bytes:
            raise InvalidRequestError(
                [Violation("entry.value", f"of {size:,} bytes is larger than the whole store")]
            )

    def _invalidated(self, space: Space, change: Change, removed: int) -> None:
        self._changed(change, space)
        scope = "namespace" if change.scope == "all" else change.scope
        self._audit.invalidated(space.tenant, space.name, scope, removed)

    def _changed(self, change: Change, space: Space) -> None:
        self._journals.of(space.tenant).add(change)

    def _next_version(self) -> int:
        """A version above all before, also above those of the process that ran before this one."""
        self._last_version = max(self._last_version + 1, self._clock.wall_us())
        return self._last_version


def _stored(entry: Entry) -> Stored:
    held = entry.segment is not None
    return Stored(held, entry.version if held else 0)
