"""Writing to a store that replicas share, and what is owed to it while it is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from agent360.client.errors import MeshError
from agent360.mesh.cache.changes import Condition, Removed, Scope, Stored
from agent360.mesh.cache.claims import Claimed
from agent360.mesh.cache.entry import Entry, Payload, Space
from agent360.mesh.cache.owed import Debt
from agent360.mesh.cache.replica import Write, count_stored, unheld
from agent360.mesh.cache.service import Invalidated
from agent360.mesh.cache.shared_reads import SharedReads
from agent360.mesh.cache.sharing import Away, SharedEntry, SharedRemoved, SharedWrite

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
        sent: list[int] = []
        wishes: list[SharedWrite] = []
        refused: list[int] = []
        for index, (space, key, payload, condition, if_version) in enumerate(writes):
            try:
                self.check_size(key, payload)
            except MeshError as error:
                results[index] = error
                continue
            settled = space.policy.settled(payload)
            if self.admits(space, key, settled, now):
                sent.append(index)
                wishes.append(SharedWrite(space, key, settled, condition, if_version))
            else:
                results[index] = Stored(False, 0)
                if condition is Condition.ALWAYS:
                    self._refuse(space, key, settled, now)
                    refused.append(index)
        places = [(writes[index].space, writes[index].key) for index in refused]
        if wishes or places:
            work = self.spawn(self._write_and_remove(wishes, places))
            stored, removed = await asyncio.shield(work)
            for index, answer in zip(sent, stored, strict=True):
                results[index] = answer
            for index, gone in zip(refused, removed, strict=True):
                results[index] = Stored(False, 0, gone.shared)
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
                for debt in list(self._owed.debts()):
                    if await self._pay(debt):
                        self._owed.paid(debt)
                if self._owed:
                    await asyncio.sleep(_REPAY_AGAIN_S)

    # ---------------------------------------------------------------- within

    async def _write_and_remove(
        self, writes: Sequence[SharedWrite], refused: Sequence[tuple[Space, str]]
    ) -> tuple[list[Stored], list[Removed]]:
        """Writes entries; what others would have replaced that were refused goes all the same."""
        removed = await self._delete(refused) if refused else []
        return (await self._write(writes) if writes else []), removed

    async def _write(self, writes: Sequence[SharedWrite]) -> list[Stored]:
        flights = [self._flights.begin(each.space, each.key, read=False) for each in writes]
        try:
            answers = await self._shared.write(writes)
        finally:
            for flight in flights:
                self._flights.end(flight)
        results = []
        for write, flight, answer in zip(writes, flights, answers, strict=True):
            space, key, payload = write.space, write.key, write.payload
            if isinstance(answer, Away):
                results.append(self._write_alone(write, answer))
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

    def _write_alone(self, write: SharedWrite, answer: Away) -> Stored:
        """Carries a write out in memory, and owes it."""
        space, key, payload, condition, if_version = write
        now = self._clock.now()
        if condition is not Condition.ALWAYS:
            version = self._version_if_not(condition, if_version, space, key, now)
            if version is not None:
                return Stored(False, version, shared=False)
        stored = self._write_settled(space, key, payload, now, admitted=True)
        self._owe(space, "keys", (key,), answer)
        return stored._replace(shared=False)

    def _refuse(self, space: Space, key: str, payload: Payload, now: float) -> None:
        """The policy lets an entry not in: who waits for it gets it all the same."""
        space.counts.sets += 1
        entry = unheld(space, key, payload, now + payload.ttl_s, self._next_version())
        self._answer_waiters(space, key, entry)

    async def _delete(self, wanted: Sequence[tuple[Space, str]]) -> list[Removed]:
        answers = await self._shared.delete(wanted)
        results = []
        for (space, key), answer in zip(wanted, answers, strict=True):
            if isinstance(answer, Away):
                removed = self._remove_keys(space, (key,), self._clock.now())
                self._owe(space, "keys", (key,), answer)
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
        if isinstance(answer, Away):
            version = self._next_version()
            self._owe(space, scope, names, answer)
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
        if isinstance(answer, Away):
            self._move(space)
            self._owe(space, "all", (), answer)
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

    def _owe(self, space: Space, scope: Scope, names: Sequence[str], answer: Away) -> None:
        self._owed.add(space, scope, names, self._shared.version_after(answer))
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
        return all(not isinstance(answer, Away) for answer in answers)

    def _answer_waiters(self, space: Space, key: str, entry: Entry) -> None:
        """The key was written: who waits for its fill gets that."""
        claim = self._claims.find(space, key)
        if claim is not None:
            self._claims.settle(claim, Claimed(entry))
