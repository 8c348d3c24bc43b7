"""Many reads and writes with a near cache in front: what is near is not asked for again."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from itertools import islice
from typing import Any

from msgspec import structs

from agent360.client.cache_operations import fill_entry, read_lookup, read_stored, size_of_entry
from agent360.client.coalescer import Coalescer
from agent360.client.entries import Entry, Lookup, Stored
from agent360.client.errors import MeshError
from agent360.client.many import Results
from agent360.client.near import Near


class NearLookups(Results[Lookup]):
    """Lookups by key; those that are not answered near go to the service, a message at a time."""

    def __init__(
        self,
        coalescer: Coalescer,
        near: Near,
        keys: Iterable[str],
        *,
        namespace: str,
        allow_stale: bool,
        timeout: float | None,
        tenant: str,
    ) -> None:
        """Prepares the lookups; nothing is sent before the results are asked for."""

        def fill(message: Any, key: str) -> None:
            message.namespace = namespace
            message.key = key
            message.include_tags = True
            if allow_stale:
                message.allow_stale = True

        def ask(keys: Iterable[str]) -> Results[Lookup]:
            return Results(
                coalescer, "get", keys, fill=fill, read=read_lookup, timeout=timeout, tenant=tenant
            )

        super().__init__(coalescer, "get", (), fill=fill, read=read_lookup)
        self._ask = ask
        self._near = near
        self._keys = iter(keys)
        self._namespace = namespace
        self._of = tenant
        self._window = 2 * coalescer.bounds.message_items

    async def batches(self) -> AsyncGenerator[list[tuple[int, Lookup | MeshError]], None]:
        """See ``Results.batches``."""
        near, namespace, tenant = self._near, self._namespace, self._of
        first = 0
        while window := list(islice(self._keys, self._window)):
            answered: list[tuple[int, Lookup | MeshError]] = []
            missing = []
            for index, key in enumerate(window, first):
                found = near.find(tenant, namespace, key)
                if found is None:
                    missing.append(index)
                else:
                    answered.append((index, found))
            if answered:
                yield answered
            if missing:
                sent = near.now()
                asked = self._ask([window[index - first] for index in missing])
                async with aclosing(asked.batches()) as batches:
                    async for batch in batches:
                        yield [
                            (missing[place], self._kept(window[missing[place] - first], each, sent))
                            for place, each in batch
                        ]
            first += len(window)

    async def _gather(self) -> list[Lookup | MeshError]:
        return await _in_order(self.batches())

    def _kept(self, key: str, found: Lookup | MeshError, sent: float) -> Lookup | MeshError:
        if isinstance(found, MeshError):
            return found
        self._near.keep(self._of, self._namespace, key, found, found.tags, sent)
        return without_tags(found)


class NearWrites(Results[Stored]):
    """Writes whose keys have no older copy near once their result is handed out."""

    def __init__(
        self,
        coalescer: Coalescer,
        near: Near,
        entries: Iterable[Entry],
        *,
        namespace: str,
        timeout: float | None,
        tenant: str,
    ) -> None:
        """Prepares the writes; nothing is sent before the results are asked for."""

        def fill(message: Any, entry: Entry) -> None:
            fill_entry(message.entry, namespace, entry)

        super().__init__(
            coalescer,
            "set",
            self._noted(entries),
            fill=fill,
            read=read_stored,
            size=size_of_entry,
            timeout=timeout,
            tenant=tenant,
        )
        self._near = near
        self._namespace = namespace
        self._of = tenant
        # The keys of what was taken from the entries and not handed out.
        self._open: dict[int, str] = {}

    async def batches(self) -> AsyncGenerator[list[tuple[int, Stored | MeshError]], None]:
        """See ``Results.batches``."""
        try:
            async with aclosing(super().batches()) as batches:
                async for batch in batches:
                    for index, stored in batch:
                        version = stored.version if isinstance(stored, Stored) else 0
                        self._note_write(self._open.pop(index), version)
                    yield batch
        finally:
            for key in self._open.values():
                self._note_write(key, 0)
            self._open.clear()

    async def _gather(self) -> list[Stored | MeshError]:
        return await _in_order(self.batches())

    def _noted(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for index, entry in enumerate(entries):
            self._open[index] = entry.key
            yield entry

    def _note_write(self, key: str, version: int) -> None:
        self._near.note_write(self._of, self._namespace, key, version)


def without_tags(lookup: Lookup) -> Lookup:
    """A lookup for a caller who did not ask for tags."""
    return structs.replace(lookup, tags=()) if lookup.tags else lookup


async def _in_order(batches: AsyncGenerator[list[tuple[int, Any]], None]) -> list[Any]:
    results: dict[int, Any] = {}
    async with aclosing(batches):
        async for batch in batches:
            results.update(batch)
    return [results[index] for index in range(len(results))]
