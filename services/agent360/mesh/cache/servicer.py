"""The wire side of the cache service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import AuditEvent, Mesh
from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.cache.assembly import assemble
from agent360.mesh.cache.changes import Scope, Stored
from agent360.mesh.cache.claims import Claim, Claimed
from agent360.mesh.cache.clock import LoopClock
from agent360.mesh.cache.entry import Payload, Space
from agent360.mesh.cache.replica import Write, count_stored
from agent360.mesh.cache.reporting import LookupReport
from agent360.mesh.cache.settings import CacheSettings
from agent360.mesh.cache.warming import at_once, warm
from agent360.mesh.cache.wire import requests as read
from agent360.mesh.cache.wire import responses as write
from agent360.mesh.runtime.call import Call, Emit, Item
from agent360.mesh.runtime.pages import (
    decode_page_token,
    encode_page_token,
    page_size,
    read_mask,
)
from agent360.mesh.runtime.service import ServiceContext, ServiceDefinition

_DESCRIPTOR: Final = pb.DESCRIPTOR.services_by_name["CacheService"]
_LARGE_BYTES: Final = 4_096


class _Audit:
    """The port ``AuditTrail``: events go to the metrics service in the background."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def invalidated(self, tenant: str, namespace: str, scope: str, removed: int) -> None:
        """See ``AuditTrail.invalidated``."""
        event = AuditEvent(
            "cache.entries.invalidate",
            f"namespaces/{namespace}",
            actor=tenant,
            attributes={"scope": scope, "removed": str(removed)},
        )
        self._mesh.audit.note(event, tenant=tenant)


class CacheServicer:
    """Serves agent360.cache.v1.CacheService."""

    def __init__(self, settings: CacheSettings, context: ServiceContext) -> None:
        self._settings = settings
        self._clock = LoopClock()
        self._log = context.log
        self._service = assemble(
            settings, self._clock, _Audit(context.mesh), context.registry, context.log
        )
        self._max_ttl_s = settings.max_ttl_s
        self._report = LookupReport(self._service.all_spaces, context.mesh.metrics)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def definitions(self) -> tuple[ServiceDefinition, ...]:
        """See ``Servicer.definitions``."""
        return (
            ServiceDefinition(
                _DESCRIPTOR,
                batch={
                    "Get": self.get,
                    "Set": self.set,
                    "Delete": self.delete,
                    "Claim": self.claim,
                    "Fill": self.fill,
                },
                unary={
                    "BatchGet": self.batch_get,
                    "BatchSet": self.batch_set,
                    "Invalidate": self.invalidate,
                    "GetStats": self.get_stats,
                },
                streaming={"Warm": self.warm, "Watch": self.watch},
            ),
        )

    def shed_memory(self, size_bytes: int) -> int:
        """See ``ShedsMemory.shed_memory``."""
        return self._service.shed_memory(size_bytes)

    async def start(self) -> None:
        """See ``Servicer.start``."""
        await self._service.start()
        for work in (self._service.run_sweeper(), self._report.run()):
            self._tasks.append(asyncio.create_task(work))

    async def close(self) -> None:
        """See ``Servicer.close``."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._report.report()
        try:
            await self._service.close()
        except OSError as error:
            self._log.warning("the hottest entries could not be kept", error=str(error))

    # ---------------------------------------------------------------- hot

    async def get(self, items: Sequence[Item], emit: Emit) -> None:
        """Reads entries; neighbours of one tenant and namespace share its look-up.

        What memory has is answered at once; the rest is fetched together.
        """
        now = self._clock.now()
        find = self._service.find
        tenant = namespace = ""
        space: Any = None
        missing: list[tuple[Item, tuple[Space, str, bool]]] = []
        for item in items:
            request = item.request
            key = request.key
            try:
                if request.namespace != namespace or item.call.tenant != tenant:
                    read.check_address(request.namespace, key)
                    tenant, namespace = item.call.tenant, request.namespace
                    space = self._service.space_to_read(tenant, namespace)
                if not 0 < len(key) <= read.SURELY_SHORT:
                    read.check_address(namespace, key)
            except MeshError as error:
                tenant = namespace = ""
                emit.fail(item, error)
                continue
            entry = find(space, key, now, request.allow_stale)
            if entry is None:
                missing.append((item, (space, key, request.allow_stale)))
                continue
            size = len(entry.value)
            if size > _LARGE_BYTES and emit.full:
                await emit.room()
            write.write_entry(emit.reply(item, size).lookup, entry, now, request.include_tags)
        self._service.note_reads()
        if missing:
            await self._get_missing(missing, emit)

    async def _get_missing(
        self, missing: Sequence[tuple[Item, tuple[Space, str, bool]]], emit: Emit
    ) -> None:
        found = await self._service.fetch([wanted for _, wanted in missing], self._clock.now())
        now = self._clock.now()
        for (item, _), each in zip(missing, found, strict=True):
            if isinstance(each, MeshError):
                emit.fail(item, each)
                continue
            size = 0 if each.entry is None else len(each.entry.value)
            if size > _LARGE_BYTES and emit.full:
                await emit.room()
            write.write_lookup(emit.reply(item, size).lookup, each, now, item.request.include_tags)

    async def set(self, items: Sequence[Item], emit: Emit) -> None:
        """Writes entries."""
        writes, items = self._writes(items, emit)
        results = await self._service.write_all(writes, self._clock.now())
        for item, result in zip(items, results, strict=True):
            if isinstance(result, MeshError):
                emit.fail(item, result)
            else:
                write.write_stored(emit.reply(item), result)

    async def delete(self, items: Sequence[Item], emit: Emit) -> None:
        """Removes entries."""
        wanted, asked = [], []
        for item in items:
            request = item.request
            try:
                read.check_address(request.namespace, request.key)
                space = self._service.space(item.call.tenant, request.namespace)
            except MeshError as error:
                emit.fail(item, error)
                continue
            wanted.append((space, request.key))
            asked.append(item)
        results = await self._service.delete_all(wanted, self._clock.now())
        for item, removed in zip(asked, results, strict=True):
            response = emit.reply(item)
            response.deleted, response.shared = removed.entries > 0, removed.shared

    async def claim(self, items: Sequence[Item], emit: Emit) -> None:
        """Reads entries or gives out the right to fill them; who must wait does so apart."""
        now = self._clock.now()
        claims = self._settings.claims
        for item in items:
            request = item.request
            try:
                read.check_address(request.namespace, request.key)
                timeout_s = read.read_fill_timeout(
                    request, claims.fill_timeout_s, claims.max_fill_timeout_s
                )
                eager = read.read_eager_refresh(request)
                space = self._service.space(item.call.tenant, request.namespace)
                found = self._service.claim(
                    space, request.key, request.allow_stale, timeout_s, now, eager
                )
            except MeshError as error:
                emit.fail(item, error)
                continue
            if isinstance(found, Claim):
                emit.start(item, self._wait(item, emit, found, timeout_s))
            else:
                self._reply_claimed(item, emit, found)
        self._service.note_reads()

    async def fill(self, items: Sequence[Item], emit: Emit) -> None:
        """Stores what was claimed, each on its own."""
        for item in items:
            emit.start(item, self._fill(item, emit))

    async def _fill(self, item: Item, emit: Emit) -> None:
        request, tenant = item.request, item.call.tenant
        read.check_fill(request)
        if request.WhichOneof("outcome") == "failure":
            fallback = await self._service.fail_claimed(tenant, request.fill_token)
            response = emit.reply(item)
            response.shared = True
            if fallback is not None:
                now = self._clock.now()
                write.write_lookup(response.fallback, fallback, now, include_tags=False)
            return
        entry = read.read_entry(request.entry, self._max_ttl_s)
        stored = await self._service.fill_claimed(
            tenant, request.fill_token, entry.namespace, entry.key, entry.payload
        )
        write.write_stored(emit.reply(item), stored)

    async def _wait(self, item: Item, emit: Emit, claim: Claim, timeout_s: float) -> None:
        claimed = await self._service.wait(claim, timeout_s, allow_stale=item.request.allow_stale)
        self._reply_claimed(item, emit, claimed)

    def _reply_claimed(self, item: Item, emit: Emit, claimed: Claimed) -> None:
        if claimed.grant is not None and not item.open:
            self._service.hand_back(claimed)
        size = 0 if claimed.entry is None else len(claimed.entry.value)
        write.write_claimed(emit.reply(item, size), claimed, self._clock.now())

    def _writes(self, items: Sequence[Item], emit: Emit) -> tuple[list[Write], list[Item]]:
        """The writes that items ask for, and those items; the others are refused."""
        writes, asked = [], []
        for item in items:
            try:
                writes.append(self._read_set(item.call.tenant, item.request))
            except MeshError as error:
                emit.fail(item, error)
                continue
            asked.append(item)
        return writes, asked

    def _read_set(self, tenant: str, request: Any) -> Write:
        wish = read.read_set(request, self._max_ttl_s)
        space = self._service.space(tenant, wish.namespace)
        return Write(space, wish.key, wish.payload, wish.condition, wish.if_version)

    # ---------------------------------------------------------------- the others

    async def batch_get(self, call: Call, request: Any) -> Any:
        """Reads many entries of one namespace."""
        read.check_keys(request.namespace, request.keys)
        now, allow_stale = self._clock.now(), request.allow_stale
        space = self._service.space_to_read(call.tenant, request.namespace)
        found: dict[int, Claimed | MeshError] = {}
        missing: list[int] = []
        for index, key in enumerate(request.keys):
            entry = self._service.find(space, key, now, allow_stale)
            if entry is None:
                missing.append(index)
            else:
                found[index] = Claimed(entry)
        wanted = [(space, request.keys[index], allow_stale) for index in missing]
        found.update(zip(missing, await self._service.fetch(wanted, now), strict=True))
        self._service.note_reads()
        response = pb.BatchGetResponse()
        size, largest = 0, self._settings.max_message_bytes - 2**16
        now = self._clock.now()
        for index in range(len(request.keys)):
            each = found[index]
            if isinstance(each, MeshError):
                raise each
            size += 0 if each.entry is None else len(each.entry.value)
            if size > largest:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "RESPONSE_TOO_LARGE",
                    f"the values take more than {largest:,} bytes together; ask for fewer keys",
                )
            write.write_lookup(response.lookups.add(), each, now, request.include_tags)
        return response

    async def batch_set(self, call: Call, request: Any) -> Any:
        """Writes many entries, each on its own."""
        read.check_batch_set(request)
        outcomes: list[Stored | MeshError | None] = []
        writes = []
        for each in request.requests:
            try:
                writes.append(self._read_set(call.tenant, each))
                outcomes.append(None)
            except MeshError as error:
                outcomes.append(error)
        results = iter(await self._service.write_all(writes, self._clock.now()))
        response = pb.BatchSetResponse()
        for outcome in outcomes:
            end = next(results) if outcome is None else outcome
            result = response.results.add()
            if isinstance(end, MeshError):
                result.error.CopyFrom(end.to_status())
            else:
                write.write_stored(result.response, end)
        return response

    async def invalidate(self, call: Call, request: Any) -> Any:
        """Removes entries by keys, prefix, tags, or all of a namespace."""
        scope: Scope = read.check_invalidate(request)
        names: Any = {
            "keys": request.keys.keys,
            "prefix": (request.prefix,),
            "tags": request.tags.tags,
            "all": (),
        }[scope]
        entries = self._read_entries("warm", request.warm, request.namespace)
        space = self._service.space(call.tenant, request.namespace)
        done = await self._service.invalidate(space, scope, tuple(names), entries)
        return pb.InvalidateResponse(
            removed=done.removed,
            namespace_version=done.version,
            shared=done.shared,
            warmed=done.warmed,
        )

    async def get_stats(self, call: Call, request: Any) -> Any:
        """Counts of the tenant's namespaces, in the order of their names."""
        read.check_namespaces(request.namespaces)
        size = page_size(request.page_size)
        query = "\0".join(sorted(request.namespaces)).encode()
        after = decode_page_token(call.tenant, query, request.page_token)
        masked = read_mask(request, pb.NamespaceStats)
        wanted = frozenset(request.namespaces)
        spaces = self._service.spaces(call.tenant)
        names = sorted(
            name
            for name in spaces
            if (not wanted or name in wanted) and (after is None or name > after)
        )
        response = pb.GetStatsResponse()
        for name in names[:size]:
            stats = pb.NamespaceStats()
            space = spaces[name]
            write.write_stats(stats, space, self._service.version_of(space))
            response.namespaces.append(masked(stats))
        if len(names) > size:
            response.next_page_token = encode_page_token(call.tenant, query, names[size - 1])
        return response

    async def warm(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Puts entries in place, with progress after each slice."""
        service, source = self._service, read.check_warm(request)
        space = service.space(call.tenant, request.namespace)

        async def write_all(entries: Sequence[tuple[str, Payload]]) -> int:
            copied = source == "from_namespace"
            writes = [Write(space, key, payload, copied=copied) for key, payload in entries]
            return count_stored(await service.write_all(writes, self._clock.now()))

        async def bring_back(keys: Sequence[str]) -> int:
            return await service.bring_back(space, keys)

        options = {"per_second": request.entries_per_second}
        if source == "hottest":
            keys = await service.hottest(space, request.hottest.limit)
            steps = warm(at_once(keys), bring_back, self._clock, total=len(keys), **options)
        elif source == "entries":
            given = request.entries.entries
            entries = self._read_entries("entries.entries", given, request.namespace)
            steps = warm(at_once(entries), write_all, self._clock, total=len(entries), **options)
        else:
            origin = service.space_to_read(call.tenant, request.from_namespace)
            steps = warm(service.copies(origin), write_all, self._clock, total=0, **options)
        async for step in steps:
            yield pb.WarmResponse(warmed=step.warmed, failed=step.failed, total=step.total)

    def _read_entries(self, field: str, entries: Any, namespace: str) -> list[tuple[str, Payload]]:
        """Entries of a list, for one namespace; a fault is named with its place in the list."""
        found = []
        for index, entry in enumerate(entries):
            try:
                wish = read.read_entry(entry, self._max_ttl_s, namespace)
            except InvalidRequestError as error:
                raise InvalidRequestError(
                    [
                        Violation(
                            f"{field}[{index}].{each.field.removeprefix('entry.')}",
                            each.description,
                        )
                        for each in error.violations
                    ]
                ) from None
            found.append((wish.key, wish.payload))
        return found

    async def watch(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Streams the tenant's invalidations."""
        read.check_namespaces(request.namespaces)
        journal = self._service.watch(call.tenant)
        events = journal.watch(
            request.resume_token,
            frozenset(request.namespaces),
            self._clock,
            self._settings.watch.heartbeat_s,
        )
        async for event in events:
            response = pb.WatchResponse()
            write.write_event(response, event)
            yield response
