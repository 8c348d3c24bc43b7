"""Reads and checks requests; every fault is named by its field path."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from agent360.cache.v1 import cache_pb2 as pb
from agent360.mesh.cache.changes import Condition, Scope
from agent360.mesh.cache.entry import Payload
from agent360.mesh.cache.policy import DEFAULT_STALE_TTL_S, DEFAULT_TTL_S
from agent360.mesh.runtime.validation import Violations, seconds_of

MAX_NAMESPACE_BYTES: Final = 128
MAX_KEY_BYTES: Final = 1_024
MAX_KEYS: Final = 1_000
MAX_HOTTEST: Final = 100_000
SURELY_SHORT: Final = MAX_KEY_BYTES // 4
"""A key of at most so many characters is not too long, whatever they are."""

_MAX_TAGS: Final = 32
_MAX_TAG_BYTES: Final = 128
_MAX_INVALIDATED_TAGS: Final = 100
_MAX_CONTENT_TYPE_BYTES: Final = 255
_MAX_TOKEN_BYTES: Final = 4_096

_CONDITIONS: Final = {
    pb.SET_CONDITION_UNSPECIFIED: Condition.ALWAYS,
    pb.SET_CONDITION_IF_ABSENT: Condition.IF_ABSENT,
    pb.SET_CONDITION_IF_VERSION: Condition.IF_VERSION,
}


class Wish(NamedTuple):
    """A request to write an entry."""

    namespace: str
    """Where."""
    key: str
    """Under which key."""
    payload: Payload
    """What."""
    condition: Condition = Condition.ALWAYS
    """When it takes effect."""
    if_version: int = 0
    """For ``Condition.IF_VERSION``."""


def check_address(namespace: str, key: str) -> None:
    """Raises InvalidRequestError unless namespace and key can be those of an entry."""
    faults = Violations()
    faults.text("namespace", namespace, max_bytes=MAX_NAMESPACE_BYTES)
    faults.text("key", key, max_bytes=MAX_KEY_BYTES)
    faults.raise_if_any()


def check_keys(namespace: str, keys: Any) -> None:
    """Raises InvalidRequestError unless one can ask for these keys at once."""
    faults = Violations()
    faults.text("namespace", namespace, max_bytes=MAX_NAMESPACE_BYTES)
    faults.count("keys", len(keys), at_least=1, at_most=MAX_KEYS)
    _check_each(faults, "keys", keys, MAX_KEY_BYTES)
    faults.raise_if_any()


def read_set(request: Any, max_ttl_s: float) -> Wish:
    """A SetRequest; longer TTLs are cut to ``max_ttl_s``.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    payload = _read_entry(request.entry, max_ttl_s, faults)
    condition = _CONDITIONS.get(request.condition)
    if condition is None:
        faults.add("condition", "is not a condition this version knows")
        condition = Condition.ALWAYS
    elif request.if_version and condition is not Condition.IF_VERSION:
        faults.add("if_version", "needs condition SET_CONDITION_IF_VERSION")
    faults.raise_if_any()
    entry = request.entry
    return Wish(entry.namespace, entry.key, payload, condition, request.if_version)


def read_entry(entry: Any, max_ttl_s: float, namespace: str | None = None) -> Wish:
    """An Entry to be written unconditionally, into ``namespace`` if that is given.

    Longer TTLs are cut to ``max_ttl_s``.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    payload = _read_entry(entry, max_ttl_s, faults, namespace)
    faults.raise_if_any()
    return Wish(entry.namespace if namespace is None else namespace, entry.key, payload)


def check_fill(request: Any) -> None:
    """Raises InvalidRequestError unless a fill has a token and an outcome."""
    faults = Violations()
    faults.text("fill_token", request.fill_token, max_bytes=_MAX_TOKEN_BYTES)
    if request.WhichOneof("outcome") is None:
        faults.add("outcome", "must be an entry or a failure")
    faults.raise_if_any()


def read_fill_timeout(request: Any, default_s: float, max_s: float) -> float:
    """How long a claimer's fill may take, in seconds.

    Raises:
        InvalidRequestError: the duration is not positive.
    """
    if not request.HasField("fill_timeout"):
        return default_s
    faults = Violations()
    seconds = faults.positive_duration("fill_timeout", request.fill_timeout)
    faults.raise_if_any()
    return min(seconds, max_s)


def read_eager_refresh(request: Any) -> float:
    """The part of its TTL after which an entry is refreshed; 0: as the policy says.

    Raises:
        InvalidRequestError: it is not below 1.
    """
    part: float = request.eager_refresh
    if not 0.0 <= part < 1.0:
        faults = Violations()
        faults.add("eager_refresh", f"must be at least 0 and below 1, is {part:g}")
        faults.raise_if_any()
    return part


def check_invalidate(request: Any) -> Scope:
    """Checks an InvalidateRequest and returns the field that is its scope.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    faults.text("namespace", request.namespace, max_bytes=MAX_NAMESPACE_BYTES)
    scope: Scope | None = request.WhichOneof("scope")
    if scope is None:
        faults.add("scope", "must be one of keys, prefix, tags and all")
    elif scope == "keys":
        keys = request.keys.keys
        faults.count("keys.keys", len(keys), at_least=1, at_most=MAX_KEYS)
        _check_each(faults, "keys.keys", keys, MAX_KEY_BYTES)
    elif scope == "prefix":
        faults.text("prefix", request.prefix, max_bytes=MAX_KEY_BYTES)
    elif scope == "tags":
        tags = request.tags.tags
        faults.count("tags.tags", len(tags), at_least=1, at_most=_MAX_INVALIDATED_TAGS)
        _check_each(faults, "tags.tags", tags, _MAX_TAG_BYTES)
    elif not request.all:
        faults.add("all", "must be true; leave it out to name another scope")
    faults.count("warm", len(request.warm), at_least=0, at_most=MAX_KEYS)
    faults.raise_if_any()
    return scope or "all"


def check_warm(request: Any) -> str:
    """Checks a WarmRequest, all but its entries, and returns the field that is its source.

    Raises:
        InvalidRequestError: it is malformed.
    """
    faults = Violations()
    faults.text("namespace", request.namespace, max_bytes=MAX_NAMESPACE_BYTES)
    source: str | None = request.WhichOneof("source")
    if source is None:
        faults.add("source", "must be one of entries, from_namespace and hottest")
    elif source == "entries":
        count = len(request.entries.entries)
        faults.count("entries.entries", count, at_least=1, at_most=MAX_KEYS)
    elif source == "hottest":
        limit = request.hottest.limit
        faults.require("hottest.limit", 0 < limit <= MAX_HOTTEST, f"must be 1 to {MAX_HOTTEST:,}")
    elif source == "from_namespace":
        faults.text("from_namespace", request.from_namespace, max_bytes=MAX_NAMESPACE_BYTES)
        if request.from_namespace == request.namespace:
            faults.add("from_namespace", "must be another than namespace")
    faults.raise_if_any()
    return source or ""


def check_batch_set(request: Any) -> None:
    """Raises InvalidRequestError unless one can ask for so many writes at once."""
    faults = Violations()
    faults.count("requests", len(request.requests), at_least=1, at_most=MAX_KEYS)
    faults.raise_if_any()


def check_namespaces(names: Any) -> None:
    """Raises InvalidRequestError unless all names can be those of namespaces."""
    faults = Violations()
    faults.count("namespaces", len(names), at_least=0, at_most=MAX_KEYS)
    _check_each(faults, "namespaces", names, MAX_NAMESPACE_BYTES)
    faults.raise_if_any()


def _read_entry(
    entry: Any, max_ttl_s: float, faults: Violations, namespace: str | None = None
) -> Payload:
    if namespace is None:
        faults.text("entry.namespace", entry.namespace, max_bytes=MAX_NAMESPACE_BYTES)
    faults.text("entry.key", entry.key, max_bytes=MAX_KEY_BYTES)
    content_type = entry.content_type
    if content_type:
        faults.text("entry.content_type", content_type, max_bytes=_MAX_CONTENT_TYPE_BYTES)
    tags = tuple(entry.tags)
    if tags:
        faults.count("entry.tags", len(tags), at_least=0, at_most=_MAX_TAGS)
        _check_each(faults, "entry.tags", tags, _MAX_TAG_BYTES)
    ttl_s = DEFAULT_TTL_S
    if entry.HasField("ttl"):
        ttl_s = min(faults.positive_duration("entry.ttl", entry.ttl), max_ttl_s)
    stale_ttl_s = DEFAULT_STALE_TTL_S
    if entry.HasField("stale_ttl"):
        stale_ttl_s = min(seconds_of(entry.stale_ttl), max_ttl_s)
        faults.require("entry.stale_ttl", stale_ttl_s >= 0, "must not be negative")
    return Payload(entry.value, ttl_s, stale_ttl_s, content_type, tags)


def _check_each(faults: Violations, field: str, texts: Any, max_bytes: int) -> None:
    for index, text in enumerate(texts):
        if not 0 < len(text) <= max_bytes // 4:
            faults.text(f"{field}[{index}]", text, max_bytes=max_bytes)
