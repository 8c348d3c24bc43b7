"""Entries of the cache, and what becomes of calls for them, as the client's users see them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from msgspec import Struct


class Outcome(IntEnum):
    """How a lookup ended."""

    HIT = 1
    """The entry is there and fresh; its value may be empty."""
    STALE = 2
    """The entry outlived its TTL but not its stale TTL, and stale values were allowed."""
    MISS = 3
    """There is no such entry."""


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
    fail_safe: bool = False
    """True where a stale value stands in: loading failed, or the shared store was away."""

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
    warmed: int = 0
    """Entries put in place of what went."""


class Warmed(Struct, frozen=True, gc=False):
    """How far warming is."""

    warmed: int
    """Entries put in place."""
    skipped: int
    """Keys that had an entry already."""
    failed: int
    """Entries that could not be loaded, or were refused."""
    total: int
    """Entries in all, as far as known."""
    errors: tuple[tuple[str, Exception], ...] = ()
    """The first errors, each with its key."""
