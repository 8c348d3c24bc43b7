"""The near copies of one tenant: used while its watch is live, dropped by what the watch tells."""

from __future__ import annotations

import asyncio
import math

from agent360.client.entries import Lookup, Outcome
from agent360.client.near_copies import ANY_VERSION, Copies, Copy
from agent360.client.near_floors import Floors
from agent360.client.watching import Event, Invalidation, Reset


class NearTenant:
    """What one tenant may read near.

    Invariant: it has no copies and takes none in while its watch is not live; a copy in use was
    asked for while the watch was live, and no event since has outdated it.
    """

    __slots__ = (
        "_copies", "_floors", "_lag_s", "_max_silence_s", "_max_ttl_s", "name", "task",
        "trusted_until", "used",
    )  # fmt: skip

    def __init__(
        self, name: str, copies: Copies, *, max_ttl_s: float, lag_s: float, max_silence_s: float
    ) -> None:
        """Makes a tenant whose watch is not live yet.

        Args:
            name: of the tenant.
            copies: where copies are held, with those of other tenants.
            max_ttl_s: how long a copy may be used.
            lag_s: how long a replica may take to hear of a change through another one.
            max_silence_s: how long the watch stays live without an event.
        """
        self.name = name
        self._copies = copies
        self._max_ttl_s = max_ttl_s
        self._lag_s = lag_s
        self._max_silence_s = max_silence_s
        self._floors = Floors()
        self.trusted_until = -math.inf
        """Copies may be used before this time."""
        self.used = -math.inf
        """When the tenant was last asked for."""
        self.task: asyncio.Task[None] | None = None
        """Attends to the watch."""

    def find(self, namespace: str, key: str, now: float) -> Copy | None:
        """The copy of an entry, if it may be used."""
        if now < self.trusted_until:
            return self._copies.find(self.name, namespace, key, now)
        return None

    def keep(
        self,
        namespace: str,
        key: str,
        lookup: Lookup,
        tags: tuple[str, ...] | None,
        sent: float,
        now: float,
    ) -> None:
        """Takes a copy of an answer in, if nothing speaks against it.

        Args:
            namespace: of the entry.
            key: of the entry.
            lookup: the answer.
            tags: of the entry; None: not known.
            sent: when it was asked for.
            now: the time.
        """
        if lookup.outcome is not Outcome.HIT or lookup.degraded or lookup.fail_safe:
            return
        fresh_until = sent + lookup.ttl_s
        expires = min(fresh_until, sent + self._max_ttl_s)
        if now < min(expires, self.trusted_until) and self._floors.allow(
            namespace, key, lookup.version, sent, now
        ):
            self._copies.put(self.name, namespace, key, lookup, tags, fresh_until, expires, now)

    def hear(self, event: Event | None, now: float) -> None:
        """Takes an event of the watch; the first one makes it live.

        Args:
            event: what happened; None: nothing.
            now: the time.
        """
        if now >= self.trusted_until:
            self.lose()
            self._floors.open(now + self._lag_s)
        self.trusted_until = now + self._max_silence_s
        if isinstance(event, Invalidation):
            self._invalidate(event, now)
        elif isinstance(event, Reset):
            self._copies.drop_tenant(self.name)
            self._floors.bar(now + self._lag_s)

    def lose(self) -> None:
        """The watch is not live any more."""
        self.trusted_until = -math.inf
        self._floors.close()
        self._copies.drop_tenant(self.name)

    def note_write(self, namespace: str, key: str, version: int, now: float) -> None:
        """This process wrote or removed an entry.

        Args:
            namespace: of the entry.
            key: of the entry.
            version: of the entry now in place; 0: not known, or there is none.
            now: when the answer was there, or given up.
        """
        self._outdate_key(namespace, key, version - 1 if version else 0, now)

    def note_invalidation(self, event: Invalidation, now: float) -> None:
        """This process asked for an invalidation."""
        self._invalidate(event, now)

    # ---------------------------------------------------------------- within

    def _invalidate(self, event: Invalidation, now: float) -> None:
        namespace = event.namespace
        versions = event.key_versions or (event.version,) * len(event.keys)
        for key, version in zip(event.keys, versions, strict=True):
            self._outdate_key(namespace, key, version, now)
        if event.keys:
            return
        copies, name = self._copies, self.name
        version = event.version or ANY_VERSION
        if event.all:
            copies.drop_namespace(name, namespace, version)
        elif event.tags:
            copies.drop_tags(name, namespace, event.tags, version)
        else:
            copies.drop_prefix(name, namespace, event.prefix, version)
        floor = event.version if event.all else 0
        self._floors.bar_namespace(namespace, now + self._lag_s, now, floor)

    def _outdate_key(self, namespace: str, key: str, version: int, now: float) -> None:
        """Drops the copy of a key up to a version; 0: any, and those that others still give out."""
        self._copies.drop_key(self.name, namespace, key, version or ANY_VERSION)
        barrier = -math.inf if version else now + self._lag_s
        self._floors.raise_key(namespace, key, version, now, barrier)
