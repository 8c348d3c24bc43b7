"""The client of the cache service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Final

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
from agent360.client.coalescer import Coalescer, Wire
from agent360.client.entries import Claim, Entry, Invalidated, Lookup, Stored
from agent360.client.errors import MeshError
from agent360.client.many import Results

WIRE: Final = Wire(
    "agent360.cache.v1.CacheService",
    cache_pb2.PipelineRequest,
    cache_pb2.PipelineItem,
    cache_pb2.PipelineResponse,
    cache_pb2.PipelineResult,
)

DEFAULT_NAMESPACE: Final = "default"


class CacheClient:
    """Reads and writes entries of the caller's tenant.

    Example:
        >>> await mesh.cache.set("plan:42", b"...", ttl=60)
        >>> lookup = await mesh.cache.get("plan:42")
        >>> lookup.value if lookup.hit else None
        b'...'
    """

    def __init__(self, coalescer: Coalescer) -> None:
        self._coalescer = coalescer

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
        operation = GetOperation(namespace, key, allow_stale, include_tags)
        return await self._coalescer.call(operation, timeout, tenant)

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
        return await self._coalescer.call(operation, timeout, tenant)

    async def delete(
        self,
        key: str,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> bool:
        """Removes one entry; returns whether there was one."""
        return await self._coalescer.call(DeleteOperation(namespace, key), timeout, tenant)

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
            timeout: as in ``get``.
            tenant: as in ``get``.
        """
        operation = ClaimOperation(namespace, key, allow_stale, fill_timeout)
        return await self._coalescer.call(operation, timeout, tenant)

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
        return await self._coalescer.call(
            FillOperation(fill_token, namespace, entry), timeout, tenant
        )

    async def fail(
        self,
        fill_token: str,
        error: MeshError,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Gives a claim up: the next caller that waits gets it."""
        await self._coalescer.call(FailOperation(fill_token, error), timeout, tenant)

    async def invalidate(
        self,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        keys: Sequence[str] | None = None,
        prefix: str | None = None,
        tags: Sequence[str] | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Invalidated:
        """Removes entries by keys, prefix or tags; without any of them, the whole namespace.

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
        response = await self._coalescer.unary(
            "Invalidate", request, cache_pb2.InvalidateResponse, timeout, tenant
        )
        return Invalidated(response.removed, response.namespace_version, response.shared)

    async def stats(
        self,
        *,
        namespaces: Sequence[str] = (),
        page_size: int = 0,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[cache_pb2.NamespaceStats]:
        """Yields hits, misses, bytes and more for each namespace of the tenant."""
        request = cache_pb2.GetStatsRequest(namespaces=namespaces, page_size=page_size)
        while True:
            page = await self._coalescer.unary(
                "GetStats", request, cache_pb2.GetStatsResponse, timeout, tenant
            )
            for stats in page.namespaces:
                yield stats
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token
