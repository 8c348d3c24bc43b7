"""The cache service's domain on one replica of several: memory before a store that all share."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import grpc
import structlog

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.cache.asking import Asking, nonce_of, open_token
from agent360.mesh.cache.changes import Condition, Removed, Scope, Stored
from agent360.mesh.cache.claims import Claim, Claimed, Claims
from agent360.mesh.cache.entry import Entry, Payload, Space, size_of
from agent360.mesh.cache.flights import Flight, Flights
from agent360.mesh.cache.journal import Change, Journal, interrupted
from agent360.mesh.cache.owed import OwedChanges
from agent360.mesh.cache.ports import AuditTrail, Clock, Store
from agent360.mesh.cache.service import (
    HOTTEST,
    CacheService,
    Invalidated,
    Limits,
    Write,
    as_payload,
    count_stored,
    stood_in,
    unheld,
)
from agent360.mesh.cache.sharing import AWAY, Away, SharedEntry, SharedStore, SharedWrite

T = TypeVar("T")

_READING_S: Final = 1.0
"""How long a key is read again and again because it was changed meanwhile."""
_REPAY_AGAIN_S: Final = 0.1
_MISS: Final = Claimed(None)
_DEGRADED_MISS: Final = Claimed(None, degraded=True)


class SharedCacheService(CacheService):
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

    def __init__(
        self,
        store: Store,
        shared: SharedStore,
        clock: Clock,
        limits: Limits,
        audit: AuditTrail,
        *,
        settle_s: float,
        log: structlog.stdlib.BoundLogger,
        **options: Any,
    ) -> None:
        """Makes the service; ``start`` connects it.

        Args:
            store: this replica's memory.
            shared: the store behind it.
            clock: of this replica.
            limits: bounds.
            audit: told of invalidations.
            settle_s: for how long after an outage what was written before its end is not believed.
            log: of the service.
            options: as of ``CacheService``.
        """
        super().__init__(store, clock, limits, audit, **options)
        self._shared = shared
        self._settle_s = settle_s
        self._log = log
        self._flights = Flights()
        self._owed = OwedChanges()
        self._owing = asyncio.Event()
        self._believed_from = 0
        self._settled_at = 0.0
        self._was_away = False
        self._heard_before = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._empty_context = contextvars.Context()
        self._claims = Claims(clock, self._new_token, limits.max_claims, orphaned=self._on_orphaned)
        self._asking = Asking(
            shared, self._claims, clock, self._new_token, self, away=_error_of_claim
        )

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """See ``CacheService.start``."""
        await self._shared.start(self)
        self.spawn(self._repay())

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

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs work that belongs to no call."""
        task = asyncio.get_running_loop().create_task(work, context=self._empty_context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---------------------------------------------------------------- reading

    async def fetch(
        self,
        wanted: Sequence[tuple[Space, str, bool]],
        now: float,  # noqa: ARG002 - time passes until the store has answered
    ) -> Sequence[Claimed | MeshError]:
        """See ``CacheService.fetch``."""
        flights, fresh = [], []
        for space, key, _ in wanted:
            flight = self._flights.joinable(space, key)
            if flight is None:
                flight = self._flights.begin(space, key, read=True)
                fresh.append(flight)
            flights.append(flight)
        if fresh:
            await asyncio.shield(self.spawn(self._read(fresh)))
        results: list[Claimed | MeshError] = []
        for flight, (space, key, allow_stale) in zip(flights, wanted, strict=True):
            await flight.landed()
            results.append(self._answer(flight, space, key, allow_stale))
        return results

    async def copies(self, space: Space) -> AsyncIterator[Sequence[tuple[str, Payload]]]:
        """See ``CacheService.copies``."""
        async for keys in self._shared.keys(space):
            found = await self._shared.read([(space, key) for key in keys])
            now = self._clock.now()
            yield [
                (key, as_payload(unheld(space, key, each.payload, each.fresh_until, 0), now))
                for key, each in zip(keys, found, strict=True)
                if isinstance(each, SharedEntry) and now < each.fresh_until
            ]

    async def hottest(self, space: Space, limit: int) -> Sequence[str]:
        """See ``CacheService.hottest``."""
        return (await self._shared.hottest(space))[:limit]

    async def bring_back(self, space: Space, keys: Sequence[str]) -> int:
        """See ``CacheService.bring_back``: copies of what the shared store still has."""
        flights = [self._flights.begin(space, key, read=True) for key in keys]
        await asyncio.shield(self.spawn(self._read(flights)))
        now = self._clock.now()
        held = [flight.entry for flight in flights if flight.entry is not None]
        return sum(entry.segment is not None and now < entry.fresh_until for entry in held)

    # ---------------------------------------------------------------- writing

    async def write_all(self, writes: Sequence[Write], now: float) -> Sequence[Stored | MeshError]:
        """See ``CacheService.write_all``."""
        results: list[Any] = [None] * len(writes)
        sent: list[tuple[int, SharedWrite, Flight]] = []
        for index, each in enumerate(writes):
            space, key, payload, condition, if_version = each
            try:
                self.check_size(key, payload)
            except MeshError as error:
                results[index] = error
                continue
            payload = space.policy.settled(payload)
            if self.admits(space, key, payload, now):
                flight = self._flights.begin(space, key, read=False)
                write = SharedWrite(space, key, payload, condition, if_version)
                sent.append((index, write, flight))
            else:
                results[index] = await self._refuse(space, key, payload, condition, now)
        if sent:
            answers = await asyncio.shield(self.spawn(self._write(sent)))
            for (index, _, _), answer in zip(sent, answers, strict=True):
                results[index] = answer
        return results

    async def delete_all(
        self,
        wanted: Sequence[tuple[Space, str]],
        now: float,  # noqa: ARG002 - time passes until the store has answered
    ) -> list[Removed]:
        """See ``CacheService.delete_all``."""
        return await asyncio.shield(self.spawn(self._delete(wanted)))

    async def invalidate(
        self,
        space: Space,
        scope: Scope,
        names: Sequence[str],
        warm: Sequence[tuple[str, Payload]] = (),
    ) -> Invalidated:
        """See ``CacheService.invalidate``."""
        for key, payload in warm:
            self.check_size(key, payload)
        return await asyncio.shield(self.spawn(self._invalidate_shared(space, scope, names, warm)))

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
        space = self.space(tenant, sealed.namespace)
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
        self, tenant: str, namespace: str, scope: Scope, names: Sequence[str], version: int
    ) -> None:
        """See ``Listener.invalidated``."""
        space = self._store.spaces(tenant).get(namespace)
        if space is not None:
            concerned = _concerned(scope, names)
            self._flights.doubt(space, concerned)
            if scope == "all":
                self._store.drop_generation(space)
            elif scope == "prefix":
                entries = [each for key, each in space.entries.items() if concerned(key)]
                self._drop(entries, version)
            else:
                self._drop(self._store.tagged(space, names), version)
            for claim in self._claims.of_space(space):
                if scope == "tags":
                    claim.doubted = True
                elif concerned(claim.key):
                    self._asking.heard(claim, version)
        journal = self._journals.watched(tenant)
        if journal is not None:
            journal.add(Change(namespace, scope, tuple(names), version))

    def released(self, tenant: str, namespace: str, key: str) -> None:
        """See ``Listener.released``."""
        space = self._store.spaces(tenant).get(namespace)
        claim = None if space is None else self._claims.find(space, key)
        if claim is not None:
            self._asking.released(claim)

    def missed(self, tenant: str, namespace: str) -> None:
        """See ``Listener.missed``."""
        space = self._store.spaces(tenant).get(namespace)
        if space is not None:
            self._flights.doubt(space, lambda _: True)
            self._store.drop_generation(space)
            for claim in self._claims.of_space(space):
                claim.doubted = True
                self._asking.released(claim)
        journal = self._journals.watched(tenant)
        if journal is not None:
            journal.add(Change(namespace, "all", (), 0))

    def reaches(self, available: bool) -> None:
        """See ``Listener.reaches``."""
        if available:
            self._log.info("the shared store is back")
        else:
            self._was_away = True
            self._log.warning("the shared store is away; memory serves alone")
        self._choose_reader()
        self._owing.set()

    def hears(self) -> None:
        """See ``Listener.hears``."""
        if self._heard_before:
            self._flights.doubt(None, lambda _: True)
            for space in self._store.all_spaces():
                self._store.drop_generation(space)
            if self._was_away:
                self._believed_from = self._shared.newest_version
                self._settled_at = self._clock.now() + self._settle_s
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

    # ---------------------------------------------------------------- for claims

    def hold(self, space: Space, key: str, found: SharedEntry) -> Entry:
        """Keeps a copy of what the shared store has, unless a newer one is here."""
        now = self._clock.now()
        payload, version, fresh_until = found
        self._last_version = max(self._last_version, version)
        there = self._store.peek(space, key, now)
        if there is not None and there.version >= version:
            return there
        largest = self._limits.max_entry_bytes
        if len(payload.value) > largest // 2 and size_of(key, payload) > largest:
            if there is not None:
                self._store.remove(there)
            return unheld(space, key, payload, fresh_until, version)
        return self._store.write(space, key, payload, now, version, fresh_until)

    def in_memory(self, space: Space, key: str) -> Entry | None:
        """The copy that is here, fresh or not."""
        return self._store.peek(space, key, self._clock.now())

    def answer_alone(self, space: Space, key: str, *, allow_stale: bool) -> Claimed | MeshError:
        """Answers a lookup from memory while the shared store is away."""
        now, counts = self._clock.now(), space.counts
        counts.degraded += 1
        entry = self._store.find(space, key, now, allow_stale)
        if entry is not None:
            return Claimed(entry, degraded=True)
        entry = self.standing_in(space, key, now)
        if entry is not None:
            return stood_in(entry, degraded=True)
        self.note_miss(space, key, now)
        return store_away() if space.policy.error_when_away else _DEGRADED_MISS

    # ---------------------------------------------------------------- within: reading

    def _choose_reader(self) -> None:
        """Copies are trusted while changes are heard, and while there is nobody else to ask."""
        trusted = self._shared.listening or not self._shared.available
        self.find = self._store.find if trusted else _find_nothing

    async def _read(self, flights: Sequence[Flight]) -> None:
        """Reads keys until nothing that was heard meanwhile outdates the answers.

        Copies are kept in the same step in which a flight ends: between the two nothing is heard.
        """
        left, until = list(flights), self._clock.now() + _READING_S
        try:
            while left and self._clock.now() < until:
                for flight in left:
                    flight.again, flight.floor = False, 0
                found = await self._shared.read([(each.space, each.key) for each in left])
                outdated = []
                for flight, each in zip(left, found, strict=True):
                    version = each.version if isinstance(each, SharedEntry) else 0
                    if each is not AWAY and flight.outdates(version):
                        outdated.append(flight)
                    else:
                        self._flights.end(flight)
                        flight.land(each, self._taken(flight.space, flight.key, each))
                left = outdated
        finally:
            for flight in left:
                if not flight.done:
                    self._flights.end(flight)
                    flight.land(AWAY)

    def _taken(self, space: Space, key: str, found: SharedEntry | Away | None) -> Entry | None:
        """What is served of an answer of the shared store; a copy is kept if it is worth that."""
        if isinstance(found, SharedEntry):
            return self._copy(space, key, found) if self.believes(space, key, found) else None
        if found is None:
            there = space.entries.get(key)
            if there is not None and not self._owed.covers(space, key):
                self._store.remove(there)
        return None

    def _answer(
        self, flight: Flight, space: Space, key: str, allow_stale: bool
    ) -> Claimed | MeshError:
        """Answers a lookup with what a read has found."""
        if flight.found is AWAY:
            return self.answer_alone(space, key, allow_stale=allow_stale)
        now, counts, entry = self._clock.now(), space.counts, flight.entry
        if entry is None:
            self.note_miss(space, key, now)
            return _MISS
        if now < entry.fresh_until:
            counts.shared_hits += 1
            return Claimed(entry)
        if allow_stale and now < entry.stale_until:
            counts.stale_hits += 1
            return Claimed(entry)
        self.note_miss(space, key, now)
        return _MISS

    def believes(self, space: Space, key: str, found: SharedEntry) -> bool:
        """Whether an entry of the shared store may be served, outages and debts considered."""
        if found.version < self._believed_from and self._clock.now() < self._settled_at:
            return False
        return not (self._owed and self._owed.covers(space, key))

    def _copy(self, space: Space, key: str, found: SharedEntry) -> Entry:
        """An entry that was read, of which a copy is kept if it is worth its room."""
        if key in space.entries or self._store.wants_copy(space, key, found.payload):
            return self.hold(space, key, found)
        return unheld(space, key, found.payload, found.fresh_until, found.version)

    def _outdate(self, space: Space, key: str, version: int) -> None:
        """The key has a newer version: older copies go, older answers under way do not count."""
        self._last_version = max(self._last_version, version)
        self._flights.heard(space, key, version)
        entry = space.entries.get(key)
        if entry is not None and entry.version < version:
            self._store.remove(entry)

    def _drop(self, entries: Sequence[Entry], version: int) -> None:
        for entry in entries:
            if entry.version <= version:
                self._store.remove(entry)

    # ---------------------------------------------------------------- within: writing

    async def _write(self, sent: Sequence[tuple[int, SharedWrite, Flight]]) -> list[Stored]:
        answers = await self._shared.write([write for _, write, _ in sent])
        results = []
        for (_, write, flight), answer in zip(sent, answers, strict=True):
            self._flights.end(flight)
            space, key, payload = write.space, write.key, write.payload
            if answer is AWAY:
                results.append(self._write_alone(write))
                continue
            if not answer.stored:
                results.append(Stored(False, answer.version))
                continue
            space.counts.sets += 1
            self._owed.written(space, key)
            found = SharedEntry(payload, answer.version, answer.fresh_until)
            entry = self._settle_here(flight, found)
            claim = self._claims.find(space, key)
            if claim is not None:
                self._asking.filled(claim, entry)
            results.append(Stored(True, answer.version))
        return results

    def _settle_here(self, flight: Flight, found: SharedEntry) -> Entry:
        """Keeps a copy of what was just written, unless something newer was heard of meanwhile."""
        space, key, version = flight.space, flight.key, found.version
        self._outdate(space, key, version)
        if flight.outdates(version):
            return unheld(space, key, found.payload, found.fresh_until, version)
        return self.hold(space, key, found)

    def _write_alone(self, write: SharedWrite) -> Stored:
        """Carries a write out in memory, and owes it."""
        space, key, payload, condition, if_version = write
        now = self._clock.now()
        if condition is not Condition.ALWAYS:
            version = self._version_if_not(condition, if_version, space, key, now)
            if version is not None:
                return Stored(False, version, shared=False)
        stored = self._write_settled(space, key, payload, now, admitted=True)
        self._owe(space, "keys", (key,))
        return stored._replace(shared=False)

    async def _refuse(
        self, space: Space, key: str, payload: Payload, condition: Condition, now: float
    ) -> Stored:
        """The policy lets an entry not in: what it would have replaced goes all the same."""
        if condition is not Condition.ALWAYS:
            return Stored(False, 0)
        space.counts.sets += 1
        claim = self._claims.find(space, key)
        if claim is not None:
            entry = unheld(space, key, payload, now + payload.ttl_s, self._next_version())
            self._asking.filled(claim, entry)
        (removed,) = await self.delete_all([(space, key)], now)
        return Stored(False, 0, removed.shared)

    async def _delete(self, wanted: Sequence[tuple[Space, str]]) -> list[Removed]:
        answers = await self._shared.delete(wanted)
        results = []
        for (space, key), answer in zip(wanted, answers, strict=True):
            if answer is AWAY:
                removed = self._remove_keys(space, (key,), self._clock.now())
                self._owe(space, "keys", (key,))
                results.append(Removed(removed, shared=False))
                continue
            self._owed.written(space, key)
            self._outdate(space, key, answer.version)
            space.counts.invalidations += answer.entries
            results.append(Removed(answer.entries))
        return results

    async def _invalidate_shared(
        self,
        space: Space,
        scope: Scope,
        names: Sequence[str],
        warm: Sequence[tuple[str, Payload]],
    ) -> Invalidated:
        warm = [(key, space.policy.settled(payload)) for key, payload in warm]
        if scope == "all":
            return await self._move_shared(space, warm)
        if scope == "keys":
            results = await self._delete([(space, key) for key in dict.fromkeys(names)])
            removed = sum(each.entries for each in results)
            shared = all(each.shared for each in results)
        else:
            removed, shared = await self._remove_shared(space, scope, names)
        self._record(space, scope, removed)
        warmed = await self._warm(space, warm)
        return Invalidated(removed, self._shared.version_of(space), shared, warmed)

    async def _remove_shared(
        self, space: Space, scope: Scope, names: Sequence[str]
    ) -> tuple[int, bool]:
        """Removes by prefix or tags; returns how many, and whether for all replicas."""
        if scope == "prefix":
            answer = await self._shared.remove_prefix(space, names[0])
        else:
            answer = await self._shared.remove_tags(space, names)
        if answer is AWAY:
            version = self._next_version()
            self._owe(space, scope, names)
            if scope == "prefix":
                return await self._remove_prefix(space, names[0], version), False
            return await self._remove_tags(space, names, version), False
        self.invalidated(space.tenant, space.name, scope, names, answer.version)
        space.counts.invalidations += answer.entries
        return answer.entries, True

    async def _move_shared(self, space: Space, warm: Sequence[tuple[str, Payload]]) -> Invalidated:
        flights = [self._flights.begin(space, key, read=False) for key, _ in warm]
        answer = await self._shared.move(space, warm)
        for flight in flights:
            self._flights.end(flight)
        self._record(space, "all", 0)
        if answer is AWAY:
            self._move(space)
            self._owe(space, "all", ())
            warmed = await self._warm(space, warm)
            return Invalidated(0, self._shared.version_of(space), shared=False, warmed=warmed)
        space.counts.invalidations += self._store.drop_generation(space)
        space.counts.sets += len(warm)
        for flight, (_, payload), each in zip(flights, warm, answer, strict=True):
            self._settle_here(flight, SharedEntry(payload, each.version, each.fresh_until))
        return Invalidated(0, self._shared.version_of(space), shared=True, warmed=len(warm))

    async def _warm(self, space: Space, warm: Sequence[tuple[str, Payload]]) -> int:
        writes = [Write(space, key, payload) for key, payload in warm]
        return count_stored(await self.write_all(writes, self._clock.now()))

    def _changed(self, change: Change, space: Space) -> None:
        """Watches learn of changes from the shared store, in the order that it gives them."""

    # ---------------------------------------------------------------- within: claims

    def _first_claim(
        self, space: Space, key: str, fill_timeout_s: float, entry: Entry | None, now: float
    ) -> Claimed | Claim:
        claim = self._claims.begin(space, key)
        claim.timeout_s = fill_timeout_s
        claim.eager = entry is not None and now < entry.fresh_until
        claim.uncounted = int(entry is None)
        self._asking.ask(claim)
        return claim

    def _note_wait(self, claim: Claim, now: float) -> None:
        if claim.decided_at:
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
        if answer is AWAY:
            return self._fill_away(claim, payload, keep=keep)
        if not answer.stored and keep:
            if claim is not None:
                self._asking.lost(claim)
            return Stored(False, answer.version)
        if claim is not None:
            self._count_fill(claim, self._clock.now())
        else:
            space.counts.fills += 1
        space.counts.sets += 1
        if keep:
            self._owed.written(space, key)
            found = SharedEntry(payload, answer.version, answer.fresh_until)
            entry = self._settle_here(flight, found)
        else:
            entry = unheld(space, key, payload, now + payload.ttl_s, self._next_version())
        open_claim = self._claims.find(space, key)
        if open_claim is not None:
            self._asking.filled(open_claim, entry)
        return Stored(keep, answer.version)

    def _fill_away(self, claim: Claim | None, payload: Payload, *, keep: bool) -> Stored:
        """The store went away between claim and fill: the value is kept here alone."""
        if claim is None:
            return Stored(False, 0, shared=False)
        now = self._clock.now()
        self._count_fill(claim, now)
        stored = self._write_settled(claim.space, claim.key, payload, now, admitted=keep)
        self._owe(claim.space, "keys", (claim.key,))
        return stored._replace(shared=False)

    def _fill_alone(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload
    ) -> Stored:
        """Fills a claim that was given while the store was away."""
        stored = self.fill(tenant, token, namespace, key, payload, self._clock.now())
        if stored.stored:
            self._owe(self.space(tenant, namespace), "keys", (key,))
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
        stand_in = self.standing_in(space, key, self._clock.now()) if answer is AWAY else None
        if stand_in is not None:
            if claim is not None:
                self._claims.fail(claim, stand_in, pause_s)
            return Claimed(stand_in, fail_safe=True, degraded=True)
        if claim is not None:
            self._asking.lost(claim)
        return None

    # ---------------------------------------------------------------- within: debts

    def _owe(self, space: Space, scope: Scope, names: Sequence[str]) -> None:
        self._owed.add(space, scope, names)
        self._owing.set()

    async def _repay(self) -> None:
        """Makes up for what was done while the store was away, as soon as it can be."""
        while True:
            await self._owing.wait()
            self._owing.clear()
            while self._owed:
                if self._shared.available:
                    for debt in list(self._owed.debts()):
                        if not await self._pay(debt.space, debt.scope, debt.names):
                            break
                        self._owed.paid(debt)
                if self._owed:
                    await asyncio.sleep(_REPAY_AGAIN_S)

    async def _pay(self, space: Space, scope: Scope, names: Sequence[str]) -> bool:
        answer: Any
        match scope:
            case "keys":
                answers = await self._shared.delete([(space, key) for key in names])
                return all(each is not AWAY for each in answers)
            case "prefix":
                answer = await self._shared.remove_prefix(space, names[0])
            case "tags":
                answer = await self._shared.remove_tags(space, names)
            case "all":
                answer = await self._shared.move(space, ())
        return answer is not AWAY


def store_away() -> MeshError:
    """What a lookup ends with that only the shared store could answer."""
    return MeshError(
        grpc.StatusCode.UNAVAILABLE,
        "STORE_AWAY",
        "the shared store is away, and this replica's memory does not have the entry",
        retry_after_s=0.5,
    )


def _error_of_claim(claim: Claim) -> MeshError | None:
    return store_away() if claim.space.policy.error_when_away else None


def _find_nothing(_: Space, __: str, ___: float, ____: bool) -> Entry | None:
    return None


def _concerned(scope: Scope, names: Sequence[str]) -> Callable[[str], bool]:
    if scope == "prefix":
        prefix = names[0]
        return lambda key: key.startswith(prefix)
    return lambda _: True
