"""The cache service's domain on one replica of several: memory before a store that all share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.cache.asking import Asking, nonce_of, open_token
from agent360.mesh.cache.changes import Scope, Stored
from agent360.mesh.cache.claims import Claim, Claimed, Claims
from agent360.mesh.cache.entry import Entry, Payload, Space
from agent360.mesh.cache.journal import Change, Journal, interrupted
from agent360.mesh.cache.replica import unheld
from agent360.mesh.cache.service import HOTTEST
from agent360.mesh.cache.shared_reads import concerned_keys, store_away
from agent360.mesh.cache.shared_writes import SharedWrites
from agent360.mesh.cache.sharing import AWAY, Away, SharedEntry


class SharedCacheService(SharedWrites):
    """A ``CacheService`` whose entries are in a store that replicas share; memory holds copies.

    What holds:

    - A copy never outlives its entry: it ends with it on a clock that is never behind the store's.
    - Never an older value after a newer one was served here: versions are given by the store, what
      is heard of a key while it is read or written sets a floor to what the answer may be, and a
      copy gives way to newer versions only.
    - While changes go unheard, copies are not trusted if the store can be asked instead; when
      changes are heard again, all copies are dropped.
    - While the store is away, memory serves alone, and says so. Writes and removals are owed, and
      made up for before what the store has under their keys is believed again. Another replica may
      owe something too: for a moment nothing is believed that was written before the outage ended.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Makes the service; ``start`` connects it. See ``SharedReads``."""
        super().__init__(*arguments, **options)
        self._heard_before = False
        limits, clock = self._limits, self._clock
        self._claims = Claims(clock, self._new_token, limits.max_claims, orphaned=self._on_orphaned)
        self._asking = Asking(
            self._shared, self._claims, clock, self._new_token, self, away=_error_of_claim
        )

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """See ``CacheService.start``."""
        await self._shared.start(self)
        self.spawn(self.repay())

    async def close(self) -> None:
        """See ``CacheService.close``; what was read most is remembered for the next run."""
        await super().close()
        for space in list(self._store.all_spaces()):
            if space.entries and self._shared.available:
                hottest = [entry.key for entry in self.keys_by_use(space, HOTTEST)]
                await self._shared.remember_hottest(space, hottest)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._shared.close()

    # ---------------------------------------------------------------- claims

    async def fill_claimed(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload
    ) -> Stored:
        """See ``CacheService.fill_claimed``."""
        sealed = open_token(token)
        if sealed is None:
            return self._fill_alone(tenant, token, namespace, key, payload)
        self.check_size(key, payload)
        for field, given, claimed in (
            ("entry.namespace", namespace, sealed.namespace),
            ("entry.key", key, sealed.key),
        ):
            if given != claimed:
                raise InvalidRequestError([Violation(field, "is not what the token claims")])
        space = self.space(tenant, namespace)
        return await asyncio.shield(self.spawn(self._fill(space, key, token, payload)))

    async def fail_claimed(self, tenant: str, token: str) -> Claimed | None:
        """See ``CacheService.fail_claimed``."""
        sealed = open_token(token)
        if sealed is None:
            return await super().fail_claimed(tenant, token)
        space = self._store.spaces(tenant).get(sealed.namespace)
        if space is None:
            space = self.space_to_read(tenant, sealed.namespace)
        return await asyncio.shield(self.spawn(self._fail(space, sealed.key, token)))

    # ---------------------------------------------------------------- watching and counting

    def version_of(self, space: Space) -> int:
        """See ``CacheService.version_of``; 0 where the namespace has none yet."""
        return self._shared.version_of(space)

    def watch(self, tenant: str) -> Journal:
        """See ``CacheService.watch``.

        Raises:
            MeshError: changes by other replicas are not heard of at present.
        """
        if not self._shared.listening:
            raise interrupted()
        return super().watch(tenant)

    # ---------------------------------------------------------------- the port Listener

    def written(self, tenant: str, namespace: str, keys: Sequence[tuple[str, int]]) -> None:
        """See ``Listener.written``."""
        journal = self._journals.watched(tenant)
        space = self._store.spaces(tenant).get(namespace)
        for key, version in keys:
            if space is not None:
                self._outdate(space, key, version)
                claim = self._claims.find(space, key)
                if claim is not None:
                    self._asking.heard(claim, version)
            if journal is not None:
                journal.add(Change(namespace, "keys", (key,), version - 1))

    def invalidated(
        self,
        tenant: str,
        namespace: str,
        scope: Scope,
        names: Sequence[str],
        version: int,
        within: Callable[[str], bool],
    ) -> None:
        """See ``Listener.invalidated``."""
        space = self._store.spaces(tenant).get(namespace)
        if space is not None:
            self._outdate_scope(space, scope, names, version)
            concerned = concerned_keys(scope, names)
            for claim in self._claims.of_space(space):
                if scope == "tags":
                    claim.doubted = True
                elif concerned(claim.key) and within(claim.key):
                    self._asking.heard(claim, version)
        journal = self._journals.watched(tenant)
        if journal is not None:
            journal.add(Change(namespace, scope, tuple(names), version))

    def released(self, tenant: str, namespace: str, key: str, nonce: str) -> None:
        """See ``Listener.released``."""
        space = self._store.spaces(tenant).get(namespace)
        claim = None if space is None else self._claims.find(space, key)
        if claim is not None:
            self._asking.released(claim, nonce)

    def missed(self, tenant: str, namespace: str) -> None:
        """See ``Listener.missed``."""
        space = self._store.spaces(tenant).get(namespace)
        if space is not None:
            self._flights.doubt(space, lambda _: True)
            self._store.drop_generation(space)
            for claim in self._claims.of_space(space):
                claim.doubted = True
                self._asking.released(claim, "")
        journal = self._journals.watched(tenant)
        if journal is not None:
            journal.add(Change(namespace, "all", (), 0))

    def reaches(self, available: bool) -> None:
        """See ``Listener.reaches``."""
        if available:
            self._log.info("the shared store is back")
            self._forget_copies()
            self._settle()
        else:
            self._was_away = True
            self._log.warning("the shared store is away; memory serves alone")
        self._choose_reader()
        self._owing.set()

    def hears(self) -> None:
        """See ``Listener.hears``."""
        if self._heard_before:
            self._forget_copies()
            if self._was_away:
                self._settle()
        self._heard_before, self._was_away = True, not self._shared.available
        for claim in self._claims.all():
            claim.doubted = True
            self._asking.restart(claim)
        self._choose_reader()

    def hears_no_more(self, reason: str) -> None:
        """See ``Listener.hears_no_more``."""
        self._log.warning("changes by other replicas are not heard", reason=reason)
        self._journals.interrupt()
        self._choose_reader()

    # ---------------------------------------------------------------- within

    def _forget_copies(self) -> None:
        """Drops all copies: changes of their entries may have gone unheard."""
        self._flights.doubt(None, lambda _: True)
        for space in self._store.all_spaces():
            self._store.drop_generation(space)

    def _settle(self) -> None:
        """For a while nothing from before is believed: others may owe changes."""
        self._believed_from = self._shared.newest_version
        self._settled_at = self._clock.now() + self._settle_s

    def _changed(self, change: Change, space: Space) -> None:
        """Watches learn of changes from the shared store, in the order that it gives them."""

    def _first_claim(
        self, space: Space, key: str, fill_timeout_s: float, entry: Entry | None, now: float
    ) -> Claimed | Claim:
        claim = self._claims.begin(space, key)
        claim.timeout_s = fill_timeout_s
        claim.eager = entry is not None and now < entry.fresh_until
        claim.uncounted = int(entry is None)
        self._asking.ask(claim)
        return claim

    def _claim_anew(self, space: Space, key: str, fill_timeout_s: float) -> Claimed | Claim:
        claim = self._claims.find(space, key)
        if claim is None:
            claim = self._claims.begin(space, key)
            claim.timeout_s = fill_timeout_s
            self._asking.ask(claim)
        return claim

    def _note_wait(self, claim: Claim, now: float) -> None:
        if claim.decided:
            self.note_miss(claim.space, claim.key, now)
        else:
            claim.uncounted += 1

    def _on_orphaned(self, claim: Claim) -> None:
        self._asking.orphaned(claim)

    async def _fill(self, space: Space, key: str, token: str, payload: Payload) -> Stored:
        now = self._clock.now()
        payload = space.policy.settled(payload)
        keep = self.admits(space, key, payload, now)
        claim = self._claims.redeem(token, space.tenant)
        nonce = nonce_of(token)
        flight = self._flights.begin(space, key, read=False)
        with self._asking.deciding(claim):
            answer = await self._shared.fill(space, key, nonce, payload, keep=keep)
        self._flights.end(flight)
        if isinstance(answer, Away):
            return self._fill_away(claim, payload, answer, keep=keep)
        if not answer.stored:
            if claim is not None:
                self._asking.lost(claim)
            return Stored(False, answer.version)
        if claim is not None:
            self._count_fill(claim, self._clock.now())
        else:
            space.counts.fills += 1
        space.counts.sets += 1
        if keep:
            found = SharedEntry(payload, answer.version, answer.fresh_until)
            entry = self._settle_here(flight, found)
        else:
            entry = unheld(space, key, payload, now + payload.ttl_s, self._next_version())
        self._answer_waiters(space, key, entry)
        return Stored(keep, answer.version)

    def _fill_away(
        self, claim: Claim | None, payload: Payload, answer: Away, *, keep: bool
    ) -> Stored:
        """The store went away between claim and fill: the value is kept here alone."""
        if claim is None:
            return Stored(False, 0, shared=False)
        now = self._clock.now()
        self._count_fill(claim, now)
        stored = self._write_settled(claim.space, claim.key, payload, now, admitted=keep)
        self._owe(claim.space, "keys", (claim.key,), answer)
        return stored._replace(shared=False)

    def _fill_alone(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload
    ) -> Stored:
        """Fills a claim that was given while the store was away."""
        stored = self.fill(tenant, token, namespace, key, payload, self._clock.now())
        if stored.stored:
            self._owe(self.space(tenant, namespace), "keys", (key,), AWAY)
        return stored._replace(shared=False)

    async def _fail(self, space: Space, key: str, token: str) -> Claimed | None:
        policy = space.policy
        pause_s = policy.fail_safe_pause_s if policy.fail_safe_s > 0 else 0.0
        space.counts.fill_failures += 1
        claim = self._claims.redeem(token, space.tenant)
        flight = self._flights.begin(space, key, read=False)
        with self._asking.deciding(claim):
            answer = await self._shared.release(space, key, nonce_of(token), pause_s)
        self._flights.end(flight)
        if isinstance(answer, SharedEntry) and self.believes(space, key, answer):
            entry = self._settle_here(flight, answer)
            if claim is not None:
                self._claims.fail(claim, entry, pause_s)
            return Claimed(entry, fail_safe=True)
        stand_in = (
            self.standing_in(space, key, self._clock.now()) if isinstance(answer, Away) else None
        )
        if stand_in is not None:
            if claim is not None:
                self._claims.fail(claim, stand_in, pause_s)
            return Claimed(stand_in, fail_safe=True, degraded=True)
        if claim is not None:
            self._asking.lost(claim)
        return None


def _error_of_claim(claim: Claim) -> MeshError | None:
    return store_away() if claim.space.policy.error_when_away else None
