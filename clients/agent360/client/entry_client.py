"""Reads and writes of cache entries, with a near cache in front where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeVar

from agent360.cache.v1 import cache_pb2
from agent360.client.cache_operations import (
    ClaimOperation,
    DeleteOperation,
    FailOperation,
    FillOperation,
    GetOperation,
    SetOperation,
    fill_entry,
    read_lookup,
    read_stored,
    size_of_entry,
)
from agent360.client.coalescer import Coalescer
from agent360.client.entries import Claim, Entry, Invalidated, Lookup, Stored
from agent360.client.errors import MeshError
from agent360.client.many import Results
from agent360.client.near import Near
from agent360.client.near_calls import NearLookups, NearWrites, without_tags
from agent360.client.operation import SingleOperation
from agent360.client.watching import Invalidation

T = TypeVar("T")

DEFAULT_NAMESPACE: Final = "default"


class EntryClient:
    """Reads and writes entries of the caller's tenant.

    Invariant: once a write has returned or failed, no older copy of its entry is read near.

    Example:
        >>> await mesh.cache.set("plan:42", b"...", ttl=60)
        >>> lookup = await mesh.cache.get("plan:42")
        >>> lookup.value if lookup.hit else None
        b'...'
    """

    def __init__(self, coalescer: Coalescer, near: Near | None = None) -> None:
        self._coalescer = coalescer
        self._near = near

    async def get(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        include_tags: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Lookup:
        """Reads one entry.

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            namespace: groups keys; 1 to 128 bytes.
            allow_stale: whether a value past its TTL may be returned.
            include_tags: whether the entry's tags are wanted.
            timeout: seconds; None: what remains in the current scope, or the default.
            tenant: on whose behalf; None: that of the current scope, or the Mesh's.

        Raises:
            MeshError: the service could not be asked. A miss is a result, not an error.
        """
        near = self._near
        if near is None:
            operation = GetOperation(namespace, key, allow_stale, include_tags)
            return await self._coalescer.call(operation, timeout, tenant)
        tenant = near.tenant_of(tenant)
        found = near.find(tenant, namespace, key, include_tags)
        if found is not None:
            return found
        covered = near.covers(namespace)
        sent = near.now()
        operation = GetOperation(namespace, key, allow_stale, include_tags or covered)
        lookup = await self._coalescer.call(operation, timeout, tenant)
        if covered:
            near.keep(tenant, namespace, key, lookup, lookup.tags, sent)
        return lookup if include_tags else without_tags(lookup)

    def peek(
        self, key: str, *, namespace: str = DEFAULT_NAMESPACE, tenant: str | None = None
    ) -> Lookup | None:
        """Reads one entry if a copy of it is near, at once.

        Args:
            key: as in ``get``.
            namespace: as in ``get``.
            tenant: as in ``get``.

        Returns:
            A fresh entry, or None where only ``get`` can tell.
        """
        near = self._near
        return None if near is None else near.peek(near.tenant_of(tenant), namespace, key)

    async def set(
        self,
        key: str,
        value: bytes,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        content_type: str = "",
        tags: Sequence[str] = (),
        if_absent: bool = False,
        if_version: int | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Stored:
        """Writes one entry.

        Args:
            key: within the namespace; 1 to 1,024 bytes.
            value: may be empty; at most the service's max_value_bytes.
            namespace: groups keys; 1 to 128 bytes.
            ttl: seconds that the entry is fresh; None: the service's default.
            stale_ttl: seconds after its TTL that it may be served stale.
            content_type: media type of the value.
            tags: labels for ``invalidate``.
            if_absent: store only if there is no fresh entry.
            if_version: store only if the entry has this version.
            timeout: as in ``get``.
            tenant: as in ``get``.

        Raises:
            MeshError: the entry is not valid, or the service could not be asked.
        """
        entry = Entry(key, value, ttl, stale_ttl, content_type, tags)
        operation = SetOperation(namespace, entry, if_absent, if_version)
        if self._near is None:
            return await self._coalescer.call(operation, timeout, tenant)
        return await self._write(self._near, operation, namespace, key, timeout, tenant)

    async def delete(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> bool:
        """Removes one entry; returns whether there was one."""
        operation = DeleteOperation(namespace, key)
        if self._near is None:
            return await self._coalescer.call(operation, timeout, tenant)
        return await self._write(self._near, operation, namespace, key, timeout, tenant)

    def get_many(
        self,
        keys: Iterable[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Results[Lookup]:
        """Reads many entries; see ``Results``."""
        near = self._near
        if near is not None and near.covers(namespace):
            return NearLookups(
                self._coalescer,
                near,
                keys,
                namespace=namespace,
                allow_stale=allow_stale,
                timeout=timeout,
                tenant=near.tenant_of(tenant),
            )

        def fill(message: Any, key: str) -> None:
            message.namespace = namespace
            message.key = key
            if allow_stale:
                message.allow_stale = True

        return Results(
            self._coalescer,
            "get",
            keys,
            fill=fill,
            read=read_lookup,
            timeout=timeout,
            tenant=tenant,
        )

    def set_many(
        self,
        entries: Iterable[Entry],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Results[Stored]:
        """Writes many entries; see ``Results``."""
        near = self._near
        if near is not None and near.covers(namespace):
            return NearWrites(
                self._coalescer,
                near,
                entries,
                namespace=namespace,
                timeout=timeout,
                tenant=near.tenant_of(tenant),
            )

        def fill(message: Any, entry: Entry) -> None:
            fill_entry(message.entry, namespace, entry)

        return Results(
            self._coalescer,
            "set",
            entries,
            fill=fill,
            read=read_stored,
            size=size_of_entry,
            timeout=timeout,
            tenant=tenant,
        )

    async def claim(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        allow_stale: bool = False,
        fill_timeout: float | None = None,
        eager_refresh: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Claim:
        """Reads an entry or, where it is missing, becomes the one caller that fills it.

        All other callers wait for the fill until their deadline, or take the stale value where
        they allow it.

        Args:
            key: within the namespace.
            namespace: groups keys.
            allow_stale: whether to take a stale value instead of waiting.
            fill_timeout: seconds that the fill may take before the next caller gets the claim.
            eager_refresh: part of its TTL, above 0 and below 1, after which the first caller that
                finds a fresh entry gets the claim with it; None: as the namespace's policy says.
            timeout: as in ``get``.
            tenant: as in ``get``.
        """
        near = self._near
        if near is not None:
            tenant = near.tenant_of(tenant)
            found = None if eager_refresh else near.find(tenant, namespace, key)
            if found is not None:
                return Claim(found, "", 0.0)
        operation = ClaimOperation(namespace, key, allow_stale, fill_timeout, eager_refresh)
        return await self._claim(operation, timeout, tenant)

    async def fill(
        self,
        fill_token: str,
        key: str,
        value: bytes,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        content_type: str = "",
        tags: Sequence[str] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Stored:
        """Stores the value that a claim asked for; not stored if the claim expired meanwhile."""
        entry = Entry(key, value, ttl, stale_ttl, content_type, tags)
        operation = FillOperation(fill_token, namespace, entry)
        if self._near is None:
            return await self._coalescer.call(operation, timeout, tenant)
        return await self._write(self._near, operation, namespace, key, timeout, tenant)

    async def fail(
        self,
        fill_token: str,
        error: MeshError,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Lookup | None:
        """Gives a claim up: the next caller that waits gets it.

        Returns:
            The stale entry that is served instead, to this caller and to those who wait, where the
            namespace's policy is fail-safe and there is one.
        """
        return await self._coalescer.call(FailOperation(fill_token, error), timeout, tenant)

    async def invalidate(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        keys: Sequence[str] | None = None,
        prefix: str | None = None,
        tags: Sequence[str] | None = None,
        warm: Sequence[Entry] = (),
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Invalidated:
        """Removes entries by keys, prefix or tags; without any of them, the whole namespace.

        Args:
            namespace: where.
            keys: these keys, at most 1,000.
            prefix: all keys that begin with this.
            tags: all entries with any of these tags.
            warm: at most 1,000 entries put in place of what goes; with a whole namespace they are
                there before the others go, so that no caller finds them missing.
            timeout: as in ``get``.
            tenant: as in ``get``.

        Raises:
            ValueError: more than one of keys, prefix and tags is given.
            MeshError: the service could not be asked.
        """
        if sum(scope is not None for scope in (keys, prefix, tags)) > 1:
            raise ValueError("give only one of keys, prefix and tags")
        request = cache_pb2.InvalidateRequest(namespace=namespace)
        if keys is not None:
            request.keys.keys.extend(keys)
        elif prefix is not None:
            request.prefix = prefix
        elif tags is not None:
            request.tags.tags.extend(tags)
        else:
            request.all = True
        for entry in warm:
            fill_entry(request.warm.add(), namespace, entry)
        near = self._near
        if near is not None:
            tenant = near.tenant_of(tenant)
        try:
            response = await self._coalescer.unary(
                "Invalidate", request, cache_pb2.InvalidateResponse, timeout, tenant
            )
        finally:
            if near is not None and tenant is not None:
                for event in _outdated_by(request):
                    near.note_invalidation(tenant, event)
        return Invalidated(
            response.removed, response.namespace_version, response.shared, response.warmed
        )

    async def _claim(
        self, operation: ClaimOperation, timeout: float | None, tenant: str | None
    ) -> Claim:
        """Claims without a look at what is near, and keeps what was found there."""
        near = self._near
        if near is None or tenant is None:
            return await self._coalescer.call(operation, timeout, tenant)
        sent = near.now()
        claim = await self._coalescer.call(operation, timeout, tenant)
        if not claim.fill_token:
            near.keep(tenant, operation.namespace, operation.key, claim.lookup, None, sent)
        return claim

    async def _write(
        self,
        near: Near,
        operation: SingleOperation[T],
        namespace: str,
        key: str,
        timeout: float | None,
        tenant: str | None,
    ) -> T:
        tenant = near.tenant_of(tenant)
        version = 0
        try:
            result = await self._coalescer.call(operation, timeout, tenant)
            if isinstance(result, Stored):
                version = result.version
        finally:
            near.note_write(tenant, namespace, key, version)
        return result


def _outdated_by(request: cache_pb2.InvalidateRequest) -> list[Invalidation]:
    """What an invalidation outdates near; which versions is not known."""
    namespace = request.namespace
    warmed = tuple(entry.key for entry in request.warm)
    events = [Invalidation(namespace, 0, keys=warmed)] if warmed else []
    match request.WhichOneof("scope"):
        case "keys" if request.keys.keys:
            events.append(Invalidation(namespace, 0, keys=tuple(request.keys.keys)))
        case "prefix":
            events.append(Invalidation(namespace, 0, prefix=request.prefix))
        case "tags" if request.tags.tags:
            events.append(Invalidation(namespace, 0, tags=tuple(request.tags.tags)))
        case "all":
            events.append(Invalidation(namespace, 0, all=True))
    return events
