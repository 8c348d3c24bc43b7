"""The cache service's domain: what callers ask of a replica whose memory is all there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from agent360.client.errors import MeshError
from agent360.mesh.cache.changes import Condition, Removed, Scope, Stored
from agent360.mesh.cache.claims import Claimed
from agent360.mesh.cache.entry import Entry, Payload, Space
from agent360.mesh.cache.journal import Journal
from agent360.mesh.cache.last_run import LastRun
from agent360.mesh.cache.replica import Replica, Write, count_stored

_SWEEP_SLICE: Final = 1_000
_SWEEP_EVERY_S: Final = 1.0
HOTTEST: Final = 1_000
"""Keys of each namespace that are remembered for the next run."""
_MISS: Final = Claimed(None)


class Invalidated(NamedTuple):
    """What an invalidation did."""

    removed: int
    """Entries removed; 0 for a whole namespace."""
    version: int
    """The namespace's version after it."""
    shared: bool
    """False where only this replica carried it out."""
    warmed: int
    """Entries put in place of what went."""


class CacheService(Replica):
    """Reads, writes and invalidates entries; decides who fills a missing one.

    Its coroutines are what callers use. Here they come to what ``Replica`` does in memory;
    ``SharedCacheService`` asks the store that replicas share.

    Example:
        >>> service = CacheService(store, clock, Limits(2**20, 2**20), audit)
        >>> space = service.space("acme", "plans")
        >>> service.write(space, "plan:42", Payload(b"...", ttl_s=60.0), clock.now())
        Stored(stored=True, version=1764000000000000, shared=True)
        >>> service.find(space, "plan:42", clock.now(), allow_stale=False).value
        b'...'
    """

    def __init__(self, *arguments: Any, last_run: LastRun | None = None, **options: Any) -> None:
        """Makes a service.

        Args:
            arguments: as of ``Replica``.
            last_run: what was read most in the last run, and where to note that of this one.
            options: as of ``Replica``.
        """
        super().__init__(*arguments, **options)
        self._last_run = last_run

    async def fetch(
        self, wanted: Sequence[tuple[Space, str, bool]], now: float
    ) -> Sequence[Claimed | MeshError]:
        """Answers lookups that memory could not answer: space, key, and whether stale is taken."""
        for space, key, _ in wanted:
            self.note_miss(space, key, now)
        return [_MISS] * len(wanted)

    async def write_all(self, writes: Sequence[Write], now: float) -> Sequence[Stored | MeshError]:
        """Writes entries, each on its own; see ``write``."""
        results: list[Stored | MeshError] = []
        for space, key, payload, condition, if_version, copied in writes:
            try:
                results.append(self.write(space, key, payload, now, condition, if_version, copied))
            except MeshError as error:
                results.append(error)
        return results

    async def delete_all(self, wanted: Sequence[tuple[Space, str]], now: float) -> list[Removed]:
        """Removes entries; see ``delete``."""
        return [Removed(int(self.delete(space, key, now))) for space, key in wanted]

    async def fill_claimed(
        self, tenant: str, token: str, namespace: str, key: str, payload: Payload
    ) -> Stored:
        """Stores what a claim asked for; see ``fill``."""
        return self.fill(tenant, token, namespace, key, payload, self._clock.now())

    async def fail_claimed(self, tenant: str, token: str) -> Claimed | None:
        """Gives a claim up; see ``give_up``."""
        entry = self.give_up(tenant, token)
        return None if entry is None else Claimed(entry, fail_safe=True)

    async def invalidate(
        self,
        space: Space,
        scope: Scope,
        names: Sequence[str],
        warm: Sequence[tuple[str, Payload]] = (),
    ) -> Invalidated:
        """Removes entries of a scope and puts others in their place.

        Args:
            space: where.
            scope: what ``names`` are.
            names: keys, one prefix, or tags; none for all.
            warm: entries by key, that nobody is to find missing if the scope is all.
        """
        removed, now = 0, self._clock.now()
        match scope:
            case "keys":
                removed = self.invalidate_keys(space, names, now)
            case "prefix":
                removed = await self.invalidate_prefix(space, names[0])
            case "tags":
                removed = await self.invalidate_tags(space, names)
            case "all":
                self.invalidate_all(space)
        results = await self.write_all([Write(space, key, what) for key, what in warm], now)
        return Invalidated(removed, space.version, shared=True, warmed=count_stored(results))

    async def copies(self, space: Space) -> AsyncIterator[Sequence[tuple[str, Payload]]]:
        """The fresh entries of a namespace as they would be written now, some at a time."""
        now = self._clock.now()
        found = []
        for key, entry in list(space.entries.items()):
            if now < entry.fresh_until:
                found.append((key, as_payload(entry, now)))
        yield found

    def keys_by_use(self, space: Space, limit: int) -> Sequence[Entry]:
        """The entries of a namespace that are read most, the hottest first."""
        now = self._clock.now()
        hottest = self._store.by_use(space)
        return [entry for entry in hottest if now < entry.fresh_until][:limit]

    async def hottest(self, space: Space, limit: int) -> Sequence[str]:
        """The keys that were read most in the last run, the hottest first."""
        if self._last_run is None:
            return ()
        return self._last_run.keys(space.tenant, space.name)[:limit]

    async def bring_back(self, space: Space, keys: Sequence[str]) -> int:
        """Puts entries of the last run back in place; returns how many are."""
        if self._last_run is None:
            return 0
        writes = []
        for key in keys:
            payload = self._last_run.payload(space.tenant, space.name, key)
            if payload is not None:
                writes.append(Write(space, key, payload, Condition.IF_ABSENT, copied=True))
        return count_stored(await self.write_all(writes, self._clock.now()))

    def watch(self, tenant: str) -> Journal:
        """The tenant's changes.

        Raises:
            MeshError: too many watch them.
        """
        return self._journals.to_watch(tenant)

    def spaces(self, tenant: str) -> Mapping[str, Space]:
        """The tenant's namespaces by name."""
        return self._store.spaces(tenant)

    def version_of(self, space: Space) -> int:
        """The namespace's version."""
        return space.version

    def all_spaces(self) -> Iterable[Space]:
        """The namespaces of all tenants."""
        return self._store.all_spaces()

    def shed_memory(self, size_bytes: int) -> int:
        """Lets go of so many bytes in memory, worth least first; returns how many it were."""
        return self._store.shed_memory(size_bytes)

    async def sweep(self) -> None:
        """Lets go of everything that is over."""
        while self._store.sweep(self._clock.now(), _SWEEP_SLICE):  # noqa: ASYNC110 - a pause
            await asyncio.sleep(0)

    async def run_sweeper(self) -> None:
        """Sweeps for ever, once a second."""
        while True:
            await asyncio.sleep(_SWEEP_EVERY_S)
            await self.sweep()

    async def start(self) -> None:
        """Connects what is behind the service."""

    async def close(self) -> None:
        """Ends all claims; what was read most is remembered for the next run.

        Raises:
            OSError: it cannot be remembered.
        """
        self._claims.close()
        if self._last_run is not None:
            spaces = list(self._store.all_spaces())
            hottest = [entry for space in spaces for entry in self.keys_by_use(space, HOTTEST)]
            await asyncio.to_thread(self._last_run.save, hottest)


def as_payload(entry: Entry, now: float) -> Payload:
    """What would have to be written now for an entry with the same end."""
    return Payload(
        entry.value,
        max(0.001, entry.fresh_until - now),
        entry.stale_until - entry.fresh_until,
        entry.content_type,
        entry.tags,
    )
