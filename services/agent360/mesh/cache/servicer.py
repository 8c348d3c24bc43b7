"""The wire side of the cache service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

import grpc

from agent360.cache.v1 import cache_pb2 as pb
from agent360.client import AuditEvent, Mesh
from agent360.client.errors import MeshError, unimplemented
from agent360.mesh.cache.admission import Bounds
from agent360.mesh.cache.claims import Claim
from agent360.mesh.cache.clock import LoopClock
from agent360.mesh.cache.entry import Payload
from agent360.mesh.cache.exposition import StoreCollector
from agent360.mesh.cache.service import CacheService, Claimed, Limits
from agent360.mesh.cache.settings import CacheSettings
from agent360.mesh.cache.stores import open_store
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
_WARM_SLICE: Final = 100


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
        bounds = Bounds(settings.max_entries, settings.max_bytes)
        store = open_store(
            settings.store,
            bounds,
            max_namespaces=settings.max_namespaces_per_tenant,
            now=self._clock.now(),
        )
        limits = Limits(
            max_value_bytes=settings.max_value_bytes,
            max_entry_bytes=settings.max_bytes,
            max_claims=settings.claims.max_open,
            journal_size=settings.watch.journal_size,
            max_watches=settings.watch.max_per_tenant,
        )
        self._service = CacheService(store, self._clock, limits, _Audit(context.mesh))
        self._ttls = read.Ttls(settings.default_ttl_s, settings.max_ttl_s)
        self._sweeper: asyncio.Task[None] | None = None
        context.registry.register(StoreCollector(store, bounds))

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

    async def start(self) -> None:
        """See ``Servicer.start``."""
        self._sweeper = asyncio.create_task(self._service.run_sweeper())

    async def close(self) -> None:
        """See ``Servicer.close``."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait((self._sweeper,))
        self._service.close()

    # ---------------------------------------------------------------- hot

    async def get(self, items: Sequence[Item], emit: Emit) -> None:
        """Reads entries; neighbours of one tenant and namespace share its look-up."""
        now = self._clock.now()
        find = self._service.find
        tenant = namespace = ""
        space: Any = None
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
                emit.reply(item).lookup.outcome = write.MISS
                continue
            size = len(entry.value)
            if size > _LARGE_BYTES and emit.full:
                await emit.room()
            write.write_entry(emit.reply(item, size).lookup, entry, now, request.include_tags)
        self._service.note_reads()

    async def set(self, items: Sequence[Item], emit: Emit) -> None:
        """Writes entries."""
        now = self._clock.now()
        for item in items:
            try:
                _fill_set(emit.reply, item, self._set(item.call.tenant, item.request, now))
            except MeshError as error:
                emit.fail(item, error)

    async def delete(self, items: Sequence[Item], emit: Emit) -> None:
        """Removes entries."""
        now = self._clock.now()
        for item in items:
            request = item.request
            try:
                read.check_address(request.namespace, request.key)
                space = self._service.space_to_read(item.call.tenant, request.namespace)
            except MeshError as error:
                emit.fail(item, error)
                continue
            emit.reply(item).deleted = self._service.delete(space, request.key, now)

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
                space = self._service.space(item.call.tenant, request.namespace)
                found = self._service.claim(space, request.key, request.allow_stale, timeout_s, now)
            except MeshError as error:
                emit.fail(item, error)
                continue
            if isinstance(found, Claim):
                emit.start(item, self._wait(item, emit, found, timeout_s))
            else:
                _fill_claim(emit, item, found, now)

    async def fill(self, items: Sequence[Item], emit: Emit) -> None:
        """Stores what was claimed."""
        now = self._clock.now()
        for item in items:
            request, tenant = item.request, item.call.tenant
            try:
                read.check_fill(request)
                if request.WhichOneof("outcome") == "failure":
                    self._service.give_up(tenant, request.fill_token)
                    emit.reply(item)
                    continue
                entry = read.read_entry(request.entry, self._ttls)
                stored = self._service.fill(
                    tenant, request.fill_token, entry.namespace, entry.key, entry.payload, now
                )
            except MeshError as error:
                emit.fail(item, error)
                continue
            response = emit.reply(item)
            response.stored, response.version = stored.stored, stored.version

    async def _wait(self, item: Item, emit: Emit, claim: Claim, timeout_s: float) -> None:
        claimed = await self._service.wait(claim, timeout_s)
        _fill_claim(emit, item, claimed, self._clock.now())

    # ---------------------------------------------------------------- the others

    async def batch_get(self, call: Call, request: Any) -> Any:
        """Reads many entries of one namespace."""
        read.check_keys(request.namespace, request.keys)
        now = self._clock.now()
        space = self._service.space_to_read(call.tenant, request.namespace)
        response = pb.BatchGetResponse()
        size, largest = 0, self._settings.max_message_bytes - 2**16
        for key in request.keys:
            lookup = response.lookups.add()
            entry = self._service.find(space, key, now, request.allow_stale)
            if entry is None:
                lookup.outcome = write.MISS
                continue
            size += len(entry.value)
            if size > largest:
                raise MeshError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "RESPONSE_TOO_LARGE",
                    f"the values take more than {largest:,} bytes together; ask for fewer keys",
                )
            write.write_entry(lookup, entry, now, request.include_tags)
        self._service.note_reads()
        return response

    async def batch_set(self, call: Call, request: Any) -> Any:
        """Writes many entries, each on its own."""
        now = self._clock.now()
        response = pb.BatchSetResponse()
        for each in request.requests:
            result = response.results.add()
            try:
                stored = self._set(call.tenant, each, now)
            except MeshError as error:
                result.error.CopyFrom(error.to_status())
                continue
            answer = result.response
            answer.stored, answer.version, answer.shared = stored.stored, stored.version, True
        return response

    async def invalidate(self, call: Call, request: Any) -> Any:
        """Removes entries by keys, prefix, tags, or all of a namespace."""
        scope = read.check_invalidate(request)
        service, space = self._service, self._service.space(call.tenant, request.namespace)
        removed = 0
        if scope == "keys":
            removed = service.invalidate_keys(space, list(request.keys.keys), self._clock.now())
        elif scope == "prefix":
            removed = await service.invalidate_prefix(space, request.prefix)
        elif scope == "tags":
            removed = await service.invalidate_tags(space, list(request.tags.tags))
        else:
            service.invalidate_all(space)
        return pb.InvalidateResponse(
            removed=removed, namespace_version=space.generation, shared=True
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
            write.write_stats(stats, spaces[name])
            response.namespaces.append(masked(stats))
        if len(names) > size:
            response.next_page_token = encode_page_token(call.tenant, query, names[size - 1])
        return response

    async def warm(self, call: Call, request: Any) -> AsyncIterator[Any]:
        """Puts entries in place, with progress after each slice."""
        source = read.check_warm(request)
        if source == "hottest":
            raise unimplemented("warming from the hottest keys of the last run")
        entries = (
            [
                read.read_entry(entry, self._ttls, request.namespace)
                for entry in request.entries.entries
            ]
            if source == "entries"
            else list(self._copies(call.tenant, request.from_namespace, request.namespace))
        )
        space = self._service.space(call.tenant, request.namespace)
        progress = pb.WarmResponse(total=len(entries))
        pause_s = _WARM_SLICE / request.entries_per_second if request.entries_per_second else 0.0
        for first in range(0, len(entries), _WARM_SLICE):
            for entry in entries[first : first + _WARM_SLICE]:
                stored = self._service.write(space, entry.key, entry.payload, self._clock.now())
                if stored.stored:
                    progress.warmed += 1
                else:
                    progress.failed += 1
            yield progress
            await asyncio.sleep(pause_s)

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

    # ---------------------------------------------------------------- within

    def _set(self, tenant: str, request: Any, now: float) -> Any:
        wish = read.read_set(request, self._ttls)
        space = self._service.space(tenant, wish.namespace)
        return self._service.write(
            space, wish.key, wish.payload, now, wish.condition, wish.if_version
        )

    def _copies(self, tenant: str, source: str, target: str) -> Iterable[read.Write]:
        """The live entries of a namespace, to be written into another."""
        now = self._clock.now()
        space = self._service.space_to_read(tenant, source)
        for key, entry in list(space.entries.items()):
            remaining_s = entry.fresh_until - now
            if remaining_s > 0 and entry.reachable:
                payload = Payload(entry.value, remaining_s, 0.0, entry.content_type, entry.tags)
                yield read.Write(target, key, payload)


def _fill_set(reply: Any, item: Item, stored: Any) -> None:
    response = reply(item)
    response.stored, response.version, response.shared = stored.stored, stored.version, True


def _fill_claim(emit: Emit, item: Item, claimed: Claimed, now: float) -> None:
    size = 0 if claimed.entry is None else len(claimed.entry.value)
    write.write_claimed(emit.reply(item, size), claimed, now)
