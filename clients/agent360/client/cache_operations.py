"""Single calls of the cache service as items of messages."""

from __future__ import annotations

from typing import Any, Final

from agent360.cache.v1 import cache_pb2
from agent360.client.entries import Claim, Entry, Lookup, Outcome, Stored
from agent360.client.errors import MeshError
from agent360.client.operation import SingleOperation

_OUTCOMES: Final = (Outcome.MISS, Outcome.HIT, Outcome.STALE, Outcome.MISS)


class GetOperation(SingleOperation[Lookup]):
    """Reads an entry."""

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
        return read_lookup(response)


class SetOperation(SingleOperation[Stored]):
    """Writes an entry."""

    __slots__ = ("entry", "if_absent", "if_version", "namespace")
    field = "set"

    def __init__(
        self, namespace: str, entry: Entry, if_absent: bool, if_version: int | None
    ) -> None:
        super().__init__(size_of_entry(entry))
        self.namespace = namespace
        self.entry = entry
        self.if_absent = if_absent
        self.if_version = if_version

    @property
    def repeatable(self) -> bool:  # type: ignore[override]  # a conditional write is not
        return not self.if_absent and self.if_version is None

    def fill(self, request: Any) -> None:
        fill_entry(request.entry, self.namespace, self.entry)
        if self.if_absent:
            request.condition = cache_pb2.SET_CONDITION_IF_ABSENT
        elif self.if_version is not None:
            request.condition = cache_pb2.SET_CONDITION_IF_VERSION
            request.if_version = self.if_version

    def read(self, response: Any) -> Stored:
        return read_stored(response)


class DeleteOperation(SingleOperation[bool]):
    """Removes an entry."""

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


class ClaimOperation(SingleOperation[Claim]):
    """Reads an entry, or becomes the one that fills it."""

    __slots__ = ("allow_stale", "eager_refresh", "fill_timeout", "key", "namespace")
    field = "claim"

    def __init__(
        self,
        namespace: str,
        key: str,
        allow_stale: bool,
        fill_timeout: float | None,
        eager_refresh: float | None,
    ) -> None:
        super().__init__()
        self.namespace = namespace
        self.key = key
        self.allow_stale = allow_stale
        self.fill_timeout = fill_timeout
        self.eager_refresh = eager_refresh

    def fill(self, request: Any) -> None:
        request.namespace = self.namespace
        request.key = self.key
        if self.allow_stale:
            request.allow_stale = True
        if self.fill_timeout is not None:
            request.fill_timeout.FromNanoseconds(round(self.fill_timeout * 1e9))
        if self.eager_refresh is not None:
            request.eager_refresh = self.eager_refresh

    def read(self, response: Any) -> Claim:
        timeout = response.fill_timeout
        return Claim(
            read_lookup(response), response.fill_token, timeout.seconds + timeout.nanos * 1e-9
        )


class FillOperation(SingleOperation[Stored]):
    """Stores what a claim was for."""

    __slots__ = ("entry", "namespace", "token")
    field = "fill"
    repeatable = False

    def __init__(self, token: str, namespace: str, entry: Entry) -> None:
        super().__init__(size_of_entry(entry))
        self.token = token
        self.namespace = namespace
        self.entry = entry

    def fill(self, request: Any) -> None:
        request.fill_token = self.token
        fill_entry(request.entry, self.namespace, self.entry)

    def read(self, response: Any) -> Stored:
        return read_stored(response)


class FailOperation(SingleOperation[Lookup | None]):
    """Gives a claim up."""

    __slots__ = ("error", "token")
    field = "fill"

    def __init__(self, token: str, error: MeshError) -> None:
        super().__init__()
        self.token = token
        self.error = error

    def fill(self, request: Any) -> None:
        request.fill_token = self.token
        request.failure.CopyFrom(self.error.to_status())

    def read(self, response: Any) -> Lookup | None:
        if not response.HasField("fallback"):
            return None
        return read_lookup(cache_pb2.GetResponse(lookup=response.fallback))


def fill_entry(message: Any, namespace: str, entry: Entry) -> None:
    """Fills an entry of the wire in place."""
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


def size_of_entry(entry: Entry) -> int:
    """About what an entry takes in a message, in bytes."""
    return len(entry.value) + len(entry.key) + 128


def read_lookup(response: Any) -> Lookup:
    """The result of a get."""
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
        message.fail_safe,
    )


def read_stored(response: Any) -> Stored:
    """The result of a write."""
    return Stored(response.stored, response.version, response.shared)


_MISS: Final = Lookup(Outcome.MISS, b"", "", 0, 0.0, (), False)
_DEGRADED_MISS: Final = Lookup(Outcome.MISS, b"", "", 0, 0.0, (), True)
