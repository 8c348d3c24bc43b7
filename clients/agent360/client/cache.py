"""The client of the cache service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from enum import IntEnum
from typing import Any, Final

from msgspec import Struct

from agent360.cache.v1 import cache_pb2
from agent360.client.coalescer import Coalescer, Wire
from agent360.client.errors import MeshError
from agent360.client.many import Results
from agent360.client.operation import SingleOperation

WIRE: Final = Wire(
    "agent360.cache.v1.CacheService",
    cache_pb2.PipelineRequest,
    cache_pb2.PipelineItem,
    cache_pb2.PipelineResponse,
    cache_pb2.PipelineResult,
)

DEFAULT_NAMESPACE: Final = "default"


class Outcome(IntEnum):
    """How a lookup ended."""

    HIT = 1
    """The entry is there and fresh; its value may be empty."""
    STALE = 2
    """The entry outlived its TTL but not its stale TTL, and stale values were allowed."""
    MISS = 3
    """There is no such entry."""


_OUTCOMES: Final = (Outcome.MISS, Outcome.HIT, Outcome.STALE, Outcome.MISS)


class Lookup(Struct, frozen=True, gc=False):
    """The result of reading one key."""

    outcome: Outcome
    """Hit, stale or miss."""
    value: bytes
    """The value; empty on a miss, and where an empty value is stored: ask ``hit``."""
    content_type: str
    """Media type of the value."""
    version: int
    """Version of the entry."""
    ttl_s: float
    """Seconds that remain of the entry's TTL; 0 for a stale entry."""
    tags: tuple[str, ...]
    """The entry's tags, where they were asked for."""
    degraded: bool
    """True where the shared store was away and one replica's memory was asked."""

    @property
    def hit(self) -> bool:
        """Whether there is a value, fresh or allowed to be stale."""
        return self.outcome is not Outcome.MISS


class Entry(Struct, frozen=True, gc=False):
    """One of many writes."""

    key: str
    """The key within the namespace."""
    value: bytes
    """The value; may be empty."""
    ttl: float | None = None
    """Seconds that the entry is fresh; None: the service's default."""
    stale_ttl: float | None = None
    """Seconds after its TTL that it may be served stale; None: not at all."""
    content_type: str = ""
    """Media type of the value."""
    tags: Sequence[str] = ()
    """Labels for ``invalidate``."""


class Stored(Struct, frozen=True, gc=False):
    """What became of a write."""

    stored: bool
    """False if its condition did not hold or the admission policy refused it."""
    version: int
    """Version of the entry now in place; 0 if there is none."""
    shared: bool
    """False where only one replica holds it because the shared store was away."""


class Claim(Struct, frozen=True, gc=False):
    """An entry, or the right to fill it."""

    lookup: Lookup
    """What was found."""
    fill_token: str
    """Not empty: the caller is the one that fills the key, by ``fill`` or ``fail``."""
    fill_timeout_s: float
    """Seconds until the token expires."""


class Invalidated(Struct, frozen=True, gc=False):
    """What an invalidation did."""

    removed: int
    """Entries removed; 0 for a whole namespace."""
    namespace_version: int
    """The namespace's version after it."""
    shared: bool
    """False where only one replica carried it out."""


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
        operation = _Get(namespace, key, allow_stale, include_tags)
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
        operation = _Set(namespace, entry, if_absent, if_version)
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
        return await self._coalescer.call(_Delete(namespace, key), timeout, tenant)

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
            read=_read_get,
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
            _fill_entry(message.entry, namespace, entry)

        return Results(
            self._coalescer,
            "set",
            entries,
            fill=fill,
            read=_read_stored,
            size=_size_of_entry,
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
        operation = _Claim(namespace, key, allow_stale, fill_timeout)
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
        return await self._coalescer.call(_Fill(fill_token, namespace, entry), timeout, tenant)

    async def fail(
        self,
        fill_token: str,
        error: MeshError,
        *,
        timeout: float | None = None,
        tenant: str | None = None,
    ) -> None:
        """Gives a claim up: the next caller that waits gets it."""
        await self._coalescer.call(_Fail(fill_token, error), timeout, tenant)

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


class _Get(SingleOperation[Lookup]):
    __slots__ = ("allow_stale", "include_tags", "key", "namespace")
    field = "get"

    def __init__(self, namespace: str, key: str, allow_stale: bool, include_tags: bool) -> None:
        super().__init__()
        self.namespace = namespace
        self.key = key
        self.allow_stale = allow_stale
        self.include_tags = include_tags

    def fill(self, request: Any) -> None:
        request.namespace = self.namespace
        request.key = self.key
        if self.allow_stale:
            request.allow_stale = True
        if self.include_tags:
            request.include_tags = True

    def read(self, response: Any) -> Lookup:
        return _read_get(response)


class _Set(SingleOperation[Stored]):
    __slots__ = ("entry", "if_absent", "if_version", "namespace")
    field = "set"

    def __init__(
        self, namespace: str, entry: Entry, if_absent: bool, if_version: int | None
    ) -> None:
        super().__init__(_size_of_entry(entry))
        self.namespace = namespace
        self.entry = entry
        self.if_absent = if_absent
        self.if_version = if_version

    @property
    def repeatable(self) -> bool:  # type: ignore[override]  # a conditional write is not
        return not self.if_absent and self.if_version is None

    def fill(self, request: Any) -> None:
        _fill_entry(request.entry, self.namespace, self.entry)
        if self.if_absent:
            request.condition = cache_pb2.SET_CONDITION_IF_ABSENT
        elif self.if_version is not None:
            request.condition = cache_pb2.SET_CONDITION_IF_VERSION
            request.if_version = self.if_version

    def read(self, response: Any) -> Stored:
        return _read_stored(response)


class _Delete(SingleOperation[bool]):
    __slots__ = ("key", "namespace")
    field = "delete"

    def __init__(self, namespace: str, key: str) -> None:
        super().__init__()
        self.namespace = namespace
        self.key = key

    def fill(self, request: Any) -> None:
        request.namespace = self.namespace
        request.key = self.key

    def read(self, response: Any) -> bool:
        return bool(response.deleted)


class _Claim(SingleOperation[Claim]):
    __slots__ = ("allow_stale", "fill_timeout", "key", "namespace")
    field = "claim"

    def __init__(
        self, namespace: str, key: str, allow_stale: bool, fill_timeout: float | None
    ) -> None:
        super().__init__()
        self.namespace = namespace
        self.key = key
        self.allow_stale = allow_stale
        self.fill_timeout = fill_timeout

    def fill(self, request: Any) -> None:
        request.namespace = self.namespace
        request.key = self.key
        if self.allow_stale:
            request.allow_stale = True
        if self.fill_timeout is not None:
            request.fill_timeout.FromNanoseconds(round(self.fill_timeout * 1e9))

    def read(self, response: Any) -> Claim:
        timeout = response.fill_timeout
        return Claim(
            _read_get(response), response.fill_token, timeout.seconds + timeout.nanos * 1e-9
        )


class _Fill(SingleOperation[Stored]):
    __slots__ = ("entry", "namespace", "token")
    field = "fill"
    repeatable = False

    def __init__(self, token: str, namespace: str, entry: Entry) -> None:
        super().__init__(_size_of_entry(entry))
        self.token = token
        self.namespace = namespace
        self.entry = entry

    def fill(self, request: Any) -> None:
        request.fill_token = self.token
        _fill_entry(request.entry, self.namespace, self.entry)

    def read(self, response: Any) -> Stored:
        return Stored(response.stored, response.version, True)


class _Fail(SingleOperation[None]):
    __slots__ = ("error", "token")
    field = "fill"

    def __init__(self, token: str, error: MeshError) -> None:
        super().__init__()
        self.token = token
        self.error = error

    def fill(self, request: Any) -> None:
        request.fill_token = self.token
        request.failure.CopyFrom(self.error.to_status())

    def read(self, _: Any) -> None:
        return None


def _fill_entry(message: Any, namespace: str, entry: Entry) -> None:
    message.namespace = namespace
    message.key = entry.key
    message.value = entry.value
    if entry.ttl is not None:
        message.ttl.FromNanoseconds(round(entry.ttl * 1e9))
    if entry.stale_ttl is not None:
        message.stale_ttl.FromNanoseconds(round(entry.stale_ttl * 1e9))
    if entry.content_type:
        message.content_type = entry.content_type
    if entry.tags:
        message.tags.extend(entry.tags)


def _size_of_entry(entry: Entry) -> int:
    return len(entry.value) + len(entry.key) + 128


def _read_get(response: Any) -> Lookup:
    message = response.lookup
    outcome = message.outcome
    if outcome == cache_pb2.OUTCOME_MISS:
        return _DEGRADED_MISS if message.degraded else _MISS
    ttl = message.ttl
    return Lookup(
        _OUTCOMES[outcome],
        message.value,
        message.content_type,
        message.version,
        ttl.seconds + ttl.nanos * 1e-9,
        tuple(message.tags),
        message.degraded,
    )


def _read_stored(response: Any) -> Stored:
    return Stored(response.stored, response.version, response.shared)


_MISS: Final = Lookup(Outcome.MISS, b"", "", 0, 0.0, (), False)
_DEGRADED_MISS: Final = Lookup(Outcome.MISS, b"", "", 0, 0.0, (), True)
