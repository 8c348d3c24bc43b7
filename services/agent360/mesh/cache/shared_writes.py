"""Writing to a store that replicas share, and what is owed to it while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from agent360.client.errors import MeshError
from agent360.mesh.cache.changes import Condition, Removed, Scope, Stored
from agent360.mesh.cache.claims import Claimed
from agent360.mesh.cache.entry import Entry, Payload, Space
from agent360.mesh.cache.flights import Flight
from agent360.mesh.cache.owed import Debt
from agent360.mesh.cache.replica import Write, count_stored, unheld
from agent360.mesh.cache.service import Invalidated
from agent360.mesh.cache.shared_reads import SharedReads
from agent360.mesh.cache.sharing import AWAY, Away, SharedEntry, SharedRemoved, SharedWrite

_REPAY_AGAIN_S: Final = 0.1


class SharedWrites(SharedReads):
    """The part of ``SharedCacheService`` that writes and removes.

    What the store cannot be asked for is carried out in memory and noted in ``_owed``; ``repay``
    makes up for it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """See ``SharedReads``."""
        super().__init__(*arguments, **options)
        self._owing = asyncio.Event()

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

    async def repay(self) -> None:
        """Makes up for what was done while the store was away, as soon as it can be."""
        while True:
            await self._owing.wait()
            self._owing.clear()
            while self._owed:
                if self._shared.available:
                    for debt in list(self._owed.debts()):
                        if not await self._pay(debt):
                            break
                        self._owed.paid(debt)
                if self._owed:
                    await asyncio.sleep(_REPAY_AGAIN_S)

    # ---------------------------------------------------------------- within

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
            found = SharedEntry(payload, answer.version, answer.fresh_until)
            entry = self._settle_here(flight, found)
            self._answer_waiters(space, key, entry)
            results.append(Stored(True, answer.version))
        return results

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
        entry = unheld(space, key, payload, now + payload.ttl_s, self._next_version())
        self._answer_waiters(space, key, entry)
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
        self._outdate_scope(space, scope, names, answer.version)
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

    def _owe(self, space: Space, scope: Scope, names: Sequence[str]) -> None:
        self._owed.add(space, scope, names, self._shared.newest_version)
        self._owing.set()

    async def _pay(self, debt: Debt) -> bool:
        """Removes what is owed, and nothing that was written later; returns whether it is done."""
        space, shared = debt.space, self._shared
        answers: Sequence[SharedRemoved | Away]
        if debt.scope == "keys":
            answers = await shared.delete([(space, key) for key in debt.names], debt.names.values())
        elif debt.scope == "tags":
            answers = [
                await shared.remove_tags(space, (tag,), upto) for tag, upto in debt.names.items()
            ]
        else:
            answers = [
                await shared.remove_prefix(space, prefix, upto)
                for prefix, upto in debt.names.items()
            ]
        return all(answer is not AWAY for answer in answers)

    def _answer_waiters(self, space: Space, key: str, entry: Entry) -> None:
        """The key was written: who waits for its fill gets that."""
        claim = self._claims.find(space, key)
        if claim is not None:
            self._claims.settle(claim, Claimed(entry))
