"""Reading before a store that replicas share: copies in memory, and when they are trusted."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import grpc
import structlog

from agent360.client.errors import MeshError
from agent360.mesh.cache.changes import Scope
from agent360.mesh.cache.claims import Claimed
from agent360.mesh.cache.entry import Entry, Payload, Space, size_of
from agent360.mesh.cache.flights import Flight, Flights
from agent360.mesh.cache.owed import OwedChanges
from agent360.mesh.cache.ports import AuditTrail, Clock, Store
from agent360.mesh.cache.replica import Limits, stood_in, unheld
from agent360.mesh.cache.service import CacheService, as_payload
from agent360.mesh.cache.sharing import AWAY, Away, SharedEntry, SharedStore

T = TypeVar("T")

_READING_S: Final = 1.0
"""How long a key is read again and again because it was changed meanwhile."""
_MISS: Final = Claimed(None)
_DEGRADED_MISS: Final = Claimed(None, degraded=True)


class SharedReads(CacheService):
    """The part of ``SharedCacheService`` that reads.

    Invariants: a copy in memory is as new as anything that was heard of its key; what is under way
    (``_flights``) learns of what is heard meanwhile, and ends in the step in which a copy is kept.
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
        self._believed_from = 0
        self._settled_at = 0.0
        self._was_away = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._empty_context = contextvars.Context()

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs work that belongs to no call."""
        task = asyncio.get_running_loop().create_task(work, context=self._empty_context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log.error("work in the background failed", exc_info=task.exception())

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
            self.spawn(self._read(fresh))
        results: list[Claimed | MeshError] = []
        for flight, (space, key, allow_stale) in zip(flights, wanted, strict=True):
            await flight.landed()
            results.append(self._answer(flight, space, key, allow_stale))
        return results

    async def copies(self, space: Space) -> AsyncIterator[Sequence[tuple[str, Payload]]]:
        """See ``CacheService.copies``.

        Raises:
            MeshError: the shared store is away.
        """
        if not self._shared.available:
            raise store_away()
        async for keys in self._shared.keys(space):
            found = await self._shared.read([(space, key) for key in keys])
            now = self._clock.now()
            yield [
                (key, as_payload(unheld(space, key, each.payload, each.fresh_until, 0), now))
                for key, each in zip(keys, found, strict=True)
                if isinstance(each, SharedEntry) and now < each.fresh_until
            ]

    async def hottest(self, space: Space, limit: int) -> Sequence[str]:
        """See ``CacheService.hottest``.

        Raises:
            MeshError: the shared store is away.
        """
        if not self._shared.available:
            raise store_away()
        return (await self._shared.hottest(space))[:limit]

    async def bring_back(self, space: Space, keys: Sequence[str]) -> int:
        """See ``CacheService.bring_back``: copies of what the shared store still has."""
        flights = [self._flights.begin(space, key, read=True) for key in keys]
        await asyncio.shield(self.spawn(self._read(flights)))
        now = self._clock.now()
        held = [flight.entry for flight in flights if flight.entry is not None]
        return sum(entry.segment is not None and now < entry.fresh_until for entry in held)

    # ---------------------------------------------------------------- copies

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

    def believes(self, space: Space, key: str, found: SharedEntry) -> bool:
        """Whether an entry of the shared store may be served, outages and debts considered."""
        if found.version < self._believed_from and self._clock.now() < self._settled_at:
            return False
        return not (self._owed and self._owed.covers(space, key, found.version))

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

    # ---------------------------------------------------------------- within

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
                    if not isinstance(each, Away) and flight.outdates(version):
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
            if there is not None and not self._owed.owes(space, key):
                self._store.remove(there)
        return None

    def _answer(
        self, flight: Flight, space: Space, key: str, allow_stale: bool
    ) -> Claimed | MeshError:
        """Answers a lookup with what a read has found."""
        if isinstance(flight.found, Away):
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

    def _copy(self, space: Space, key: str, found: SharedEntry) -> Entry:
        """An entry that was read, of which a copy is kept if it is worth its room."""
        if key in space.entries or self._store.wants_copy(space, key, found.payload):
            return self.hold(space, key, found)
        return unheld(space, key, found.payload, found.fresh_until, found.version)

    def _settle_here(self, flight: Flight, found: SharedEntry) -> Entry:
        """Keeps a copy of what was just written, unless something newer was heard of meanwhile."""
        space, key, version = flight.space, flight.key, found.version
        self._outdate(space, key, version)
        if flight.outdates(version):
            return unheld(space, key, found.payload, found.fresh_until, version)
        return self.hold(space, key, found)

    def _outdate(self, space: Space, key: str, version: int) -> None:
        """The key has a newer version: older copies go, older answers under way do not count."""
        self._last_version = max(self._last_version, version)
        self._flights.heard(space, key, version)
        entry = space.entries.get(key)
        if entry is not None and entry.version < version:
            self._store.remove(entry)

    def _outdate_scope(
        self, space: Space, scope: Scope, names: Sequence[str], version: int
    ) -> None:
        """Entries of a scope up to a version are gone from the shared store."""
        concerned = concerned_keys(scope, names)
        self._flights.doubt(space, concerned)
        if scope == "all":
            self._store.drop_generation(space)
        elif scope == "prefix":
            entries = [entry for key, entry in space.entries.items() if concerned(key)]
            self._drop(entries, version)
        else:
            self._drop(self._store.tagged(space, names), version)

    def _drop(self, entries: Sequence[Entry], version: int) -> None:
        for entry in entries:
            if entry.version <= version:
                self._store.remove(entry)


def store_away() -> MeshError:
    """What a lookup ends with that only the shared store could answer."""
    return MeshError(
        grpc.StatusCode.UNAVAILABLE,
        "STORE_AWAY",
        "the shared store is away, and this replica's memory does not have the entry",
        retry_after_s=0.5,
    )


def _find_nothing(_: Space, __: str, ___: float, ____: bool) -> Entry | None:
    return None


def concerned_keys(scope: Scope, names: Sequence[str]) -> Callable[[str], bool]:
    """Which keys a change may concern; of tags, that is any."""
    if scope == "prefix":
        prefix = names[0]
        return lambda key: key.startswith(prefix)
    return lambda _: True
