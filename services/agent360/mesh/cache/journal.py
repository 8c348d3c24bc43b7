"""What was written and invalidated lately: a bounded ring for each tenant."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Container
from typing import Final, NamedTuple

import grpc

from agent360.client.errors import InvalidRequestError, MeshError, Violation
from agent360.mesh.cache.changes import Scope
from agent360.mesh.cache.ports import Clock

KEYS_AT_ONCE: Final = 1_000


class Change(NamedTuple):
    """Entries that near copies may no longer stand for."""

    namespace: str
    """Where."""
    scope: Scope
    """What ``names`` are."""
    names: tuple[str, ...]
    """Keys, one prefix, or tags; empty for the whole namespace."""
    version: int
    """Copies up to this version are outdated; 0: all copies."""
    versions: tuple[int, ...] = ()
    """Of keys, the same for each of them; empty: ``version`` stands for all."""


class Event(NamedTuple):
    """What a watch delivers."""

    token: str
    """To continue after this event."""
    change: Change | None
    """What changed; None: nothing, the watch is alive and complete up to here."""
    reset: str = ""
    """Not empty: changes may have been missed, for this reason."""


class Journal:
    """The changes of one tenant, numbered in their order.

    Invariant: ``_ring`` holds the changes up to number ``_last``, without a gap, and ``_names`` is
    how many keys and tags they name.
    """

    __slots__ = ("_epoch", "_last", "_names", "_ring", "_size", "_waiting", "watchers")

    def __init__(self, size: int, epoch: str) -> None:
        """Makes an empty journal.

        Args:
            size: how many changes it holds; one that names several keys counts as several.
            epoch: tells its numbers from those of any other journal.
        """
        self._ring: deque[Change] = deque()
        self._size = size
        self._names = 0
        self._epoch = epoch
        self._last = 0
        self._waiting: set[asyncio.Future[bool]] = set()
        self.watchers = 0
        """How many watch it now."""

    def add(self, change: Change) -> None:
        """Notes a change and wakes those who watch."""
        ring = self._ring
        ring.append(change)
        self._last += 1
        self._names += len(change.names) or 1
        while self._names > self._size:
            self._names -= len(ring.popleft().names) or 1
        if self._waiting:
            for future in self._waiting:
                _set(future, True)
            self._waiting.clear()

    def interrupt(self, epoch: str) -> None:
        """Changes may go unheard: all watches end, and no token from before can be continued."""
        self._epoch = epoch
        for future in self._waiting:
            _set(future, False)
        self._waiting.clear()

    async def watch(
        self, resume_token: str, namespaces: Container[str], clock: Clock, heartbeat_s: float
    ) -> AsyncIterator[Event]:
        """Yields what happened after a token, and goes on for ever.

        The first event comes at once: it says from where on nothing will be missed. A watch that
        is too slow for the ring gets a reset; it holds no memory of its own.

        Args:
            resume_token: of the last event that was seen; empty: from now on.
            namespaces: those of interest; empty: all.
            clock: says when to give a sign of life.
            heartbeat_s: how often that is, in seconds.

        Raises:
            InvalidRequestError: the token is malformed.
            MeshError: changes may go unheard from now on.
        """
        ours = self._epoch
        position = self._last
        reset = ""
        if resume_token:
            epoch, position = _read_token(resume_token)
            if epoch != ours or position > self._last:
                position, reset = self._last, "the token is not of this replica's present run"
        self.watchers += 1
        try:
            yield Event(self._token(position), None, reset)
            beat_at = clock.now() + heartbeat_s
            while True:
                while position < self._last:
                    if self._epoch != ours:
                        raise interrupted()
                    event, position = self._next(position, namespaces)
                    if event is not None:
                        yield event
                        beat_at = clock.now() + heartbeat_s
                if self._epoch != ours:
                    raise interrupted()
                if clock.now() >= beat_at or not await self._changed(clock, beat_at):
                    if self._epoch != ours:
                        raise interrupted()
                    # Also where others' namespaces change all the time: it is complete up to here.
                    yield Event(self._token(position), None)
                    beat_at = clock.now() + heartbeat_s
        finally:
            self.watchers -= 1

    def _next(self, position: int, namespaces: Container[str]) -> tuple[Event | None, int]:
        """The next event of interest after a position, and the position after it."""
        if position < self._last - len(self._ring):
            position = self._last
            return Event(self._token(position), None, "too far behind"), position
        change, position = self._read(position, namespaces)
        return None if change is None else Event(self._token(position), change), position

    def _read(self, position: int, namespaces: Container[str]) -> tuple[Change | None, int]:
        """The next change of interest, with the writes of its namespace that follow at once."""
        ring = self._ring
        offset = position - (self._last - len(ring))
        found: Change | None = None
        keys: dict[str, int] = {}
        while offset < len(ring):
            change = ring[offset]
            if namespaces and change.namespace not in namespaces:
                offset += 1
                continue
            if found is None:
                found = change
                if change.scope != "keys":
                    offset += 1
                    break
            elif (
                change.scope != "keys"
                or change.namespace != found.namespace
                or len(keys) + len(change.names) > KEYS_AT_ONCE
            ):
                break
            for key in change.names:
                keys[key] = max(change.version, keys.get(key, 0))
            offset += 1
        position = self._last - len(ring) + offset
        if found is not None and keys:
            version = max(keys.values())
            exact = () if version == min(keys.values()) else tuple(keys.values())
            found = found._replace(names=tuple(keys), version=version, versions=exact)
        return found, position

    async def _changed(self, clock: Clock, until: float) -> bool:
        """Waits for a change; False if none came in time."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        timer = clock.call_at(until, lambda: _set(future, False))
        self._waiting.add(future)
        try:
            return await future
        finally:
            self._waiting.discard(future)
            timer.cancel()

    def _token(self, position: int) -> str:
        return f"{self._epoch}.{position}"


class Journals:
    """The journals of all tenants."""

    def __init__(self, size: int, new_epoch: Callable[[], str], max_watches: int) -> None:
        """Makes none yet.

        Args:
            size: how many changes each holds.
            new_epoch: makes a text that is never made again.
            max_watches: how many may watch one journal.
        """
        self._size = size
        self._new_epoch = new_epoch
        self._max_watches = max_watches
        self._by_tenant: dict[str, Journal] = {}

    def of(self, tenant: str) -> Journal:
        """The tenant's journal."""
        journal = self._by_tenant.get(tenant)
        if journal is None:
            journal = self._by_tenant[tenant] = Journal(self._size, self._new_epoch())
        return journal

    def watched(self, tenant: str) -> Journal | None:
        """The tenant's journal, if anybody ever asked for it."""
        return self._by_tenant.get(tenant)

    def interrupt(self) -> None:
        """Ends all watches of all tenants."""
        for journal in self._by_tenant.values():
            journal.interrupt(self._new_epoch())

    def to_watch(self, tenant: str) -> Journal:
        """The tenant's journal, for one more who watches.

        Raises:
            MeshError: too many watch it.
        """
        journal = self.of(tenant)
        if journal.watchers >= self._max_watches:
            raise MeshError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "WATCHES_EXHAUSTED",
                f"{journal.watchers:,} watches are open, which is the most a tenant may have",
            )
        return journal


def interrupted() -> MeshError:
    """What a watch ends with that might miss something."""
    return MeshError(
        grpc.StatusCode.UNAVAILABLE,
        "CHANGES_UNHEARD",
        "this replica does not hear of changes by others at present; watch again, or another one",
        retry_after_s=0.5,
    )


def _set(future: asyncio.Future[bool], changed: bool) -> None:
    if not future.done():
        future.set_result(changed)


def _read_token(token: str) -> tuple[str, int]:
    epoch, dot, position = token.rpartition(".")
    if not dot or not epoch or not (position.isascii() and position.isdigit()) or len(token) > 64:
        raise InvalidRequestError([Violation("resume_token", "is not a token of this service")])
    return epoch, int(position)
