"""Entries, claims and changes of many tenants in the memory of one replica."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.cache.changes import Condition, Scope, Stored
from agent360.mesh.cache.claims import Claim, Claimed, Claims
from agent360.mesh.cache.entry import Entry, Payload, Space, size_of
from agent360.mesh.cache.journal import Change, Journals
from agent360.mesh.cache.policy import Admission
from agent360.mesh.cache.ports import AuditTrail, Clock, Store

_SLICE: Final = 5_000


class Write(NamedTuple):
    """A wish to write an entry."""

    space: Space
    """Where."""
    key: str
    """Under which key."""
    payload: Payload
    """What."""
    condition: Condition = Condition.ALWAYS
    """When it takes effect."""
    if_version: int = 0
    """For ``Condition.IF_VERSION``."""


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


class Replica:
    """Reads, writes and invalidates entries in memory; decides who fills a missing one.

    All but ``wait`` and the removal by prefix or tags answer at once. Methods take the time from
    ``now``, which the caller reads once for a batch.

    Invariant: an entry is written before the journal says so and before waiters are answered, so
    that whoever acts on either finds it.
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
        self._new_token = new_token
        self._claims = Claims(clock, new_token, limits.max_claims)
        self._journals = Journals(limits.journal_size, new_token, limits.max_watches)
        self._last_version = 0
        self.space = store.space
        """The namespace of a tenant; see ``Store.space``."""
        self.space_to_read = store.space_to_read
        """The same for lookups alone; see ``Store.space_to_read``."""
        self.find: Callable[[Space, str, float, bool], Entry | None] = store.find
        """The entry that answers a lookup; see ``Store.find``."""
        self.note_reads = store.note_reads
        """To be called once for a batch of lookups; see ``Store.note_reads``."""

    def note_miss(self, space: Space, key: str, now: float) -> None:
        """Counts a lookup that found nothing."""
        space.counts.misses += 1
        if space.doorkeeper is not None:
            space.doorkeeper.looked_up(key, now)

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
        loaded before, comes too late. Where the namespace's policy refuses the entry, the one that
        it would have replaced goes all the same.

        Raises:
            InvalidRequestError: the entry is too large.
        """
        self.check_size(key, payload)
        if condition is not Condition.ALWAYS:
            version = self._version_if_not(condition, if_version, space, key, now)
            if version is not None:
                return Stored(False, version)
        payload = space.policy.settled(payload)
        admitted = self.admits(space, key, payload, now)
        return self._write_settled(space, key, payload, now, admitted=admitted)

    def delete(self, space: Space, key: str, now: float) -> bool:
        """Removes an entry; returns whether there was one."""
        entry = self._store.peek(space, key, now)
        if entry is not None:
            self._invalidate(entry)
        self._claims.outdate(space, key.__eq__)
        self._changed(Change(space.name, "keys", (key,), self._next_version()), space)
        return entry is not None

    def claim(
        self,
        space: Space,
        key: str,
        allow_stale: bool,
        fill_timeout_s: float,
        now: float,
        eager_refresh: float = 0.0,
    ) -> Claimed | Claim:
        """Finds an entry, claims the right to fill it, or returns the claim to wait for.

        Args:
            space: where.
            key: which key.
            allow_stale: whether a stale entry is taken instead of waiting.
            fill_timeout_s: how long the caller's fill may take.
            now: the time.
            eager_refresh: the part of its TTL after which a fresh entry is refreshed; 0: as the
                namespace's policy says.

        Raises:
            MeshError: too many claims are open.
        """
        entry = self.find(space, key, now, allow_stale)
        claim = self._claims.find(space, key)
        if entry is not None and now < entry.fresh_until:
            if claim is not None or not _due_for_refresh(entry, eager_refresh, now):
                return Claimed(entry)
            return self._first_claim(space, key, fill_timeout_s, entry, now)
        if claim is None:
            return self._first_claim(space, key, fill_timeout_s, entry, now)
        if claim.stand_in is not None:
            return stood_in(claim.stand_in)
        if entry is not None:
            return Claimed(entry)
        self._note_wait(claim, now)
        return claim

    async def wait(
        self, claim: Claim, fill_timeout_s: float, *, allow_stale: bool = False
    ) -> Claimed:
        """Waits until the key is filled, or until the claim falls to the caller.

        The claim may have ended since it was found: then its result counts, or it is claimed anew.
        """
        while claim.ended:
            if claim.result is not None:
                return claim.result
            found = self._claim_anew(claim.space, claim.key, fill_timeout_s)
            if isinstance(found, Claimed):
                return found
            claim = found
        if claim.stand_in is not None:
            return Claimed(claim.stand_in, fail_safe=True)
        return await self._claims.wait(claim, fill_timeout_s, allow_stale=allow_stale)

    def hand_back(self, claimed: Claimed) -> None:
        """Nobody takes the answer to a claim: if it is the right to fill, the next one gets it."""
        self._claims.hand_back(claimed)

    def fill(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload, now: float
    ) -> Stored:
        """Stores what a claim asked for and answers who waits.

        The value is discarded if the token has expired, or if the key was written or invalidated
        since the claim: it may be older than that.

        Raises:
            InvalidRequestError: the entry is too large, or is not the one that was claimed.
        """
        self.check_size(key, payload)
        claim = self._claims.redeem(token, tenant)
        if claim is None:
            there = self._store.spaces(tenant).get(namespace)
            entry = None if there is None else self._store.peek(there, key, now)
            return Stored(False, 0 if entry is None else entry.version)
        space = claim.space
        if space.name != namespace or claim.key != key:
            field = "entry.key" if space.name == namespace else "entry.namespace"
            raise InvalidRequestError([Violation(field, "is not what the token claims")])
        if not claim.void_tags.isdisjoint(payload.tags):
            self._claims.pass_on(claim)
            return Stored(False, 0)
        self._count_fill(claim, now)
        payload = space.policy.settled(payload)
        entry = self._put(space, key, payload, now, admitted=self.admits(space, key, payload, now))
        self._claims.settle(claim, Claimed(entry))
        return _stored(entry)

    def give_up(self, tenant: str, token: str) -> Entry | None:
        """The filler failed: the next caller that waits gets the claim.

        Where the namespace is fail-safe and still has the entry, all get that instead, and loading
        is tried again after a pause.

        Returns:
            The entry that stands in, if one does.
        """
        claim = self._claims.redeem(token, tenant)
        if claim is None:
            return None
        claim.space.counts.fill_failures += 1
        entry = self.standing_in(claim.space, claim.key, self._clock.now())
        if entry is None:
            self._claims.pass_on(claim)
        else:
            self._claims.fail(claim, entry, claim.space.policy.fail_safe_pause_s)
        return entry

    def standing_in(self, space: Space, key: str, now: float) -> Entry | None:
        """The entry that may stand in by the namespace's policy; nothing is counted."""
        entry = self._store.peek(space, key, now) if space.policy.fail_safe_s > 0 else None
        if entry is None or now >= entry.fresh_until + space.policy.fail_safe_s:
            return None
        return entry

    def invalidate_keys(self, space: Space, keys: Sequence[str], now: float) -> int:
        """Removes entries by key; returns how many there were."""
        removed = self._remove_keys(space, keys, now)
        change = Change(space.name, "keys", tuple(keys), self._next_version())
        self._invalidated(space, change, removed)
        return removed

    async def invalidate_prefix(self, space: Space, prefix: str) -> int:
        """Removes the entries whose keys begin with a prefix; returns how many there were."""
        version = self._next_version()
        removed = await self._remove_prefix(space, prefix, version)
        self._invalidated(space, Change(space.name, "prefix", (prefix,), version), removed)
        return removed

    async def invalidate_tags(self, space: Space, tags: Sequence[str]) -> int:
        """Removes the entries with any of the tags; returns how many there were."""
        version = self._next_version()
        removed = await self._remove_tags(space, tags, version)
        self._invalidated(space, Change(space.name, "tags", tuple(tags), version), removed)
        return removed

    def invalidate_all(self, space: Space) -> None:
        """Moves a namespace to its next version, in the same time however many entries it has."""
        self._move(space)
        space.version += 1
        self._invalidated(space, Change(space.name, "all", (), self._next_version()), 0)

    def check_size(self, key: str, payload: Payload) -> None:
        """Checks that an entry could be held at all.

        Raises:
            InvalidRequestError: it is too large.
        """
        size, largest = len(payload.value), self._limits.max_value_bytes
        if size > largest:
            raise InvalidRequestError(
                [Violation("entry.value", f"must be at most {largest:,} bytes, is {size:,}")]
            )
        if size_of(key, payload) > self._limits.max_entry_bytes:
            raise InvalidRequestError(
                [Violation("entry.value", f"of {size:,} bytes is larger than the whole store")]
            )

    def admits(self, space: Space, key: str, payload: Payload, now: float) -> bool:
        """Whether the namespace's policy lets an entry in; counts those that it refuses."""
        policy = space.policy
        admitted = policy.takes(payload)
        if admitted and policy.admission is Admission.DOORKEEPER and space.doorkeeper is not None:
            admitted = space.doorkeeper.written(key, now) >= policy.doorkeeper_accesses
        if not admitted:
            space.counts.rejections += 1
        return admitted

    # ---------------------------------------------------------------- within

    def _first_claim(
        self, space: Space, key: str, fill_timeout_s: float, entry: Entry | None, now: float
    ) -> Claimed | Claim:
        """Answers the first claim of a key, with the entry that is there, fresh or stale."""
        if entry is None:
            self.note_miss(space, key, now)
        return Claimed(entry, self._claims.open(space, key, fill_timeout_s))

    def _claim_anew(self, space: Space, key: str, fill_timeout_s: float) -> Claimed | Claim:
        """Claims a key for a caller whose lookup was counted before."""
        claim = self._claims.find(space, key)
        if claim is not None:
            return claim
        now = self._clock.now()
        entry = self._store.peek(space, key, now)
        if entry is not None and now < entry.fresh_until:
            return Claimed(entry)
        return Claimed(None, self._claims.open(space, key, fill_timeout_s))

    def _note_wait(self, claim: Claim, now: float) -> None:
        """Counts the lookup of a caller that waits for another's fill."""
        self.note_miss(claim.space, claim.key, now)

    def _version_if_not(
        self, condition: Condition, if_version: int, space: Space, key: str, now: float
    ) -> int | None:
        """The version of the entry that is there if a condition does not hold, else None."""
        there = self._store.peek(space, key, now)
        version = 0 if there is None else there.version
        if condition is Condition.IF_ABSENT:
            holds = there is None or now >= there.fresh_until
        else:
            holds = version == if_version
        return None if holds else version

    def _write_settled(
        self, space: Space, key: str, payload: Payload, now: float, *, admitted: bool
    ) -> Stored:
        """Writes an entry whose TTLs are settled, and ends the claim of its key."""
        entry = self._put(space, key, payload, now, admitted=admitted)
        claim = self._claims.find(space, key)
        if claim is not None:
            self._claims.settle(claim, Claimed(entry))
        return _stored(entry)

    def _put(
        self, space: Space, key: str, payload: Payload, now: float, *, admitted: bool
    ) -> Entry:
        version = self._next_version()
        space.counts.sets += 1
        if admitted:
            entry = self._store.write(space, key, payload, now, version)
        else:
            there = self._store.peek(space, key, now)
            if there is not None:
                self._store.remove(there)
            entry = unheld(space, key, payload, now + payload.ttl_s, version)
        self._changed(Change(space.name, "keys", (key,), version - 1), space)
        return entry

    def _count_fill(self, claim: Claim, now: float) -> None:
        counts = claim.space.counts
        counts.fills += 1
        counts.fill_time_s += now - claim.began

    def _invalidate(self, entry: Entry) -> None:
        """Removes an entry and counts it."""
        if entry.segment is not None:
            self._store.remove(entry)
            entry.space.counts.invalidations += 1

    def _remove_keys(self, space: Space, keys: Sequence[str], now: float) -> int:
        removed = 0
        for key in dict.fromkeys(keys):
            entry = self._store.peek(space, key, now)
            if entry is not None:
                self._invalidate(entry)
                removed += 1
        self._claims.outdate(space, frozenset(keys).__contains__)
        return removed

    async def _remove_prefix(self, space: Space, prefix: str, version: int) -> int:
        self._claims.outdate(space, lambda key: key.startswith(prefix))
        entries = space.entries
        found = (entries.get(key) if key.startswith(prefix) else None for key in list(entries))
        return await self._remove_in_slices(found, version)

    async def _remove_tags(self, space: Space, tags: Sequence[str], version: int) -> int:
        self._claims.outdate_tags(space, tags)
        return await self._remove_in_slices(self._store.tagged(space, tags), version)

    def _move(self, space: Space) -> None:
        space.counts.invalidations += self._store.drop_generation(space)
        self._claims.outdate(space, lambda _: True)

    async def _remove_in_slices(self, entries: Iterable[Entry | None], version: int) -> int:
        """Removes entries not newer than ``version``, pausing so that others are served.

        Entries that are over and not yet swept are let go of, and not counted.
        """
        removed = 0
        for count, entry in enumerate(entries, 1):
            if (
                entry is not None
                and entry.version <= version
                and entry.segment is not None
                and entry.reachable
                and self._store.peek(entry.space, entry.key, self._clock.now()) is entry
            ):
                self._invalidate(entry)
                removed += 1
            if not count % _SLICE:
                await asyncio.sleep(0)
        return removed

    def _invalidated(self, space: Space, change: Change, removed: int) -> None:
        self._changed(change, space)
        self._record(space, change.scope, removed)

    def _record(self, space: Space, scope: Scope, removed: int) -> None:
        named = "namespace" if scope == "all" else scope
        self._audit.invalidated(space.tenant, space.name, named, removed)

    def _changed(self, change: Change, space: Space) -> None:
        self._journals.of(space.tenant).add(change)

    def _next_version(self) -> int:
        """A version above all before, also above those of the process that ran before this one."""
        self._last_version = max(self._last_version + 1, self._clock.wall_us())
        return self._last_version


def unheld(space: Space, key: str, payload: Payload, fresh_until: float, version: int) -> Entry:
    """An entry that is handed out and not kept."""
    entry = Entry(space, key, 0)
    entry.write(payload, fresh_until, version, 0)
    return entry


def stood_in(entry: Entry, *, degraded: bool = False) -> Claimed:
    """An entry that stands in, counted as such."""
    counts = entry.space.counts
    counts.stale_hits += 1
    counts.fail_safe_hits += 1
    return Claimed(entry, fail_safe=True, degraded=degraded)


def _due_for_refresh(entry: Entry, asked: float, now: float) -> bool:
    part = asked or entry.space.policy.eager_refresh
    return part > 0 and now >= entry.fresh_until - entry.ttl_s * (1.0 - part)


def _stored(entry: Entry) -> Stored:
    held = entry.segment is not None
    return Stored(held, entry.version if held else 0)


def count_stored(results: Iterable[Stored | MeshError]) -> int:
    return sum(isinstance(result, Stored) and result.stored for result in results)
