"""The client of the cache service."""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import aclosing
from typing import Any, Final, ParamSpec, TypeVar

from agent360.cache.v1 import cache_pb2
from agent360.client import warming
from agent360.client.cached_functions import CachedFunction, cached
from agent360.client.coalescer import Wire
from agent360.client.context import current_scope
from agent360.client.entries import Invalidated, Warmed
from agent360.client.entry_client import DEFAULT_NAMESPACE
from agent360.client.loading import LoadingClient
from agent360.client.near import NearStats
from agent360.client.serializers import UNCHANGED, Serializer
from agent360.client.watching import CacheWatch, Invalidation

P = ParamSpec("P")
T = TypeVar("T")

WIRE: Final = Wire(
    "agent360.cache.v1.CacheService",
    cache_pb2.PipelineRequest,
    cache_pb2.PipelineItem,
    cache_pb2.PipelineResponse,
    cache_pb2.PipelineResult,
)


class CacheClient(LoadingClient):
    """Reads, loads and warms entries of the caller's tenant.

    Example:
        >>> await mesh.cache.set("plan:42", b"...", ttl=60)
        >>> lookup = await mesh.cache.get("plan:42")
        >>> lookup.value if lookup.hit else None
        b'...'
    """

    def cached(
        self,
        *,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        key: str | Callable[..., str] | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        tags: Sequence[str] = (),
        serializer: Serializer[Any] | None = None,
        ignore: Sequence[str] = (),
        allow_stale: bool = True,
        eager_refresh: float | None = None,
        fill_timeout: float | None = None,
        timeout: float | None = None,
    ) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], CachedFunction[P, T]]:
        """Caches the results of an asynchronous function here; see ``agent360.client.cached``.

        Example:
            >>> @mesh.cache.cached(ttl=60, key="plan:{plan_id}")
            ... async def plan(plan_id: int) -> Plan: ...
            >>> await plan(42)
            >>> await plan.invalidate(42)
        """
        return cached(
            self,
            ttl=ttl,
            stale_ttl=stale_ttl,
            key=key,
            namespace=namespace,
            tags=tags,
            serializer=serializer,
            ignore=ignore,
            allow_stale=allow_stale,
            eager_refresh=eager_refresh,
            fill_timeout=fill_timeout,
            timeout=timeout,
        )

    def watch(self, *, namespaces: Sequence[str] = (), tenant: str | None = None) -> CacheWatch:
        """What is written and invalidated from now on; see ``CacheWatch``.

        Example:
            >>> async with mesh.cache.watch(namespaces=["plans"]) as events:
            ...     async for event in events:
            ...         print(event)

        Args:
            namespaces: those of interest; empty: all of the tenant.
            tenant: as in ``get``.
        """
        return CacheWatch(self._coalescer, namespaces, self._tenant_of(tenant))

    def warm(
        self,
        keys: Iterable[str],
        load: Callable[[str], Awaitable[T]],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        concurrency: int = 16,
        per_second: float | None = None,
        fill_timeout: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[Warmed]:
        """Loads the entries that are missing; yields how far it is, after each of them.

        An error fails its key alone; the first of them come with what is yielded. Keys that another
        process loads are left to it.

        Example:
            >>> async for progress in mesh.cache.warm(keys, read_plan, namespace="plans"):
            ...     print(progress.warmed, "of", progress.total)

        Args:
            keys: taken as they are needed.
            load: gives the value of a key.
            namespace: groups keys.
            ttl: as in ``set``.
            stale_ttl: as in ``set``.
            serializer: of the values; by default they are bytes.
            content_type: media type of the values; None: the serializer's.
            tags: of all entries.
            concurrency: how many are loaded at a time.
            per_second: how many may be begun in a second; None: as many as there is room for.
            fill_timeout: as in ``claim``.
            timeout: seconds for each call.
            tenant: as in ``get``.
        """
        plan = warming.Plan(
            namespace, load, serializer, ttl, stale_ttl, content_type, tuple(tags), fill_timeout,
            timeout, self._tenant_of(tenant),
        )  # fmt: skip
        return warming.warm(self, keys, plan, concurrency, per_second)

    def warm_from(
        self,
        *,
        from_namespace: str,
        namespace: str = DEFAULT_NAMESPACE,
        per_second: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[Warmed]:
        """Copies another namespace's live entries within the service; yields how far it is.

        Args:
            from_namespace: where the entries are.
            namespace: where they go.
            per_second: entries a second; None: as fast as possible.
            timeout: seconds for all of it; None: as long as the service allows.
            tenant: as in ``get``.
        """
        request = cache_pb2.WarmRequest(namespace=namespace, from_namespace=from_namespace)
        return self._warmed(request, per_second, timeout, self._tenant_of(tenant))

    def warm_hottest(
        self,
        limit: int,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        per_second: float | None = None,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> AsyncIterator[Warmed]:
        """Puts the keys in place that were read most in the service's last run.

        Args:
            limit: how many; 1 to 100,000.
            namespace: as in ``warm_from``.
            per_second: as in ``warm_from``.
            timeout: as in ``warm_from``.
            tenant: as in ``get``.
        """
        request = cache_pb2.WarmRequest(namespace=namespace)
        request.hottest.limit = limit
        return self._warmed(request, per_second, timeout, self._tenant_of(tenant))

    async def invalidate_and_warm(
        self,
        keys: Iterable[str],
        load: Callable[[str], Awaitable[T]],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        ttl: float | None = None,
        stale_ttl: float | None = None,
        serializer: Serializer[T] = UNCHANGED,
        content_type: str | None = None,
        tags: Sequence[str] = (),
        concurrency: int = 16,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> Invalidated:
        """Loads entries anew, then removes all of the namespace but these.

        Nothing is removed before all is loaded. The first 1,000 entries, or as many as a message
        takes, are there before the others go; the rest is written right after.

        Args:
            keys: of the entries.
            load: gives the value of a key.
            namespace: which one.
            ttl: as in ``set``.
            stale_ttl: as in ``set``.
            serializer: of the values; by default they are bytes.
            content_type: media type of the values; None: the serializer's.
            tags: of all entries.
            concurrency: how many are loaded at a time.
            timeout: seconds for each call.
            tenant: as in ``get``.

        Raises:
            MeshError: the service could not be asked.
            Exception: whatever ``load`` raised first; then nothing was removed.
        """
        plan = warming.Plan(
            namespace, load, serializer, ttl, stale_ttl, content_type, tuple(tags), None,
            timeout, self._tenant_of(tenant),
        )  # fmt: skip
        room = self._coalescer.max_message_bytes - 2**16
        return await warming.invalidate_and_warm(self, keys, plan, concurrency, room)

    @property
    def near_stats(self) -> NearStats:
        """What the near cache did and holds; all zero if there is none."""
        return self._near.stats if self._near is not None else NearStats()

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

    async def _warmed(
        self,
        request: cache_pb2.WarmRequest,
        per_second: float | None,
        timeout: float | None,
        tenant: str,
    ) -> AsyncGenerator[Warmed, None]:
        """Lets the service warm a namespace; what was near of it is dropped in the end."""
        work = warming.warm_by_service(self._coalescer, request, per_second, timeout, tenant)
        try:
            async with aclosing(work) as progress:
                async for each in progress:
                    yield each
        finally:
            if self._near is not None:
                event = Invalidation(request.namespace, 0, all=True)
                self._near.note_invalidation(tenant, event)

    def _tenant_of(self, tenant: str | None) -> str:
        return tenant if tenant is not None else current_scope().tenant or self._coalescer.tenant
