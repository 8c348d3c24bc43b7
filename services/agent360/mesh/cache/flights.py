"""Reads and writes of the shared store under way, and what is heard of their keys meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent360.mesh.cache.entry import Entry, Space
from agent360.mesh.cache.sharing import Away, SharedEntry


class Flight:
    """One key of a read or a write that is under way.

    ``floor`` is the version of the newest change of the key that was heard of since it began: an
    older answer is outdated. ``again``: something was heard that may concern the key, or may have
    gone unheard.
    """

    __slots__ = ("again", "done", "entry", "floor", "found", "key", "space", "waiter")

    def __init__(self, space: Space, key: str) -> None:
        self.space = space
        self.key = key
        self.floor = 0
        self.again = False
        self.done = False
        self.found: SharedEntry | Away | None = None
        self.entry: Entry | None = None
        self.waiter: asyncio.Future[None] | None = None

    def outdates(self, version: int) -> bool:
        """Whether an answer of that version (0: that there is none) may be outdated."""
        return self.again or version < self.floor

    def land(self, found: SharedEntry | Away | None, entry: Entry | None = None) -> None:
        """It is over; all who wait for it are told.

        Args:
            found: the answer.
            entry: what is served of it.
        """
        self.found, self.entry = found, entry
        self.done = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def landed(self) -> None:
        """Returns once it is over."""
        if not self.done:
            if self.waiter is None:
                self.waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self.waiter)


class Flights:
    """All flights of this replica.

    Invariant: ``joinable`` holds a read by its key as long as nothing was heard that outdates it;
    whoever asks later than that begins a new one.
    """

    def __init__(self) -> None:
        self._joinable: dict[tuple[Space, str], Flight] = {}
        self._all: dict[tuple[Space, str], list[Flight]] = {}

    def joinable(self, space: Space, key: str) -> Flight | None:
        """A read of the key that may be shared."""
        return self._joinable.get((space, key))

    def begin(self, space: Space, key: str, *, read: bool) -> Flight:
        """Notes a read or a write that begins."""
        flight = Flight(space, key)
        place = (space, key)
        self._all.setdefault(place, []).append(flight)
        if read:
            self._joinable[place] = flight
        return flight

    def end(self, flight: Flight) -> None:
        """It is over."""
        place = (flight.space, flight.key)
        flights = self._all[place]
        flights.remove(flight)
        if not flights:
            del self._all[place]
        if self._joinable.get(place) is flight:
            del self._joinable[place]

    def heard(self, space: Space, key: str, version: int) -> None:
        """The key was changed, with that version."""
        for flight in self._all.get((space, key), ()):
            flight.floor = max(flight.floor, version)
            if self._joinable.get((space, key)) is flight:
                del self._joinable[space, key]

    def doubt(self, space: Space | None, concerned: Callable[[str], bool]) -> None:
        """Keys of a namespace, or of all, may have been changed."""
        for (place, key), flights in self._all.items():
            if (space is None or place is space) and concerned(key):
                for flight in flights:
                    flight.again = True
                self._joinable.pop((place, key), None)

    def __len__(self) -> int:
        """How many keys there is something under way for."""
        return len(self._all)
