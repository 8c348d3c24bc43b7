"""Finds the entries whose time is over, without looking at the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from agent360.mesh.cache.entry import Entry

_TICK_S: Final = 1.0


class ExpiryWheel:
    """Entries by the second in which they end.

    Invariant: an added entry is in the slot of its ``tick`` until it is discarded or due.
    """

    __slots__ = ("_next_tick", "_slots")

    def __init__(self, now: float) -> None:
        self._slots: dict[int, dict[Entry, None]] = {}
        self._next_tick = int(now / _TICK_S)

    def add(self, entry: Entry) -> None:
        """Files an entry under ``gone_at``."""
        tick = int(entry.gone_at / _TICK_S)
        entry.tick = tick
        slot = self._slots.get(tick)
        if slot is None:
            slot = self._slots[tick] = {}
        slot[entry] = None

    def discard(self, entry: Entry) -> None:
        """Takes an entry out, if it is in."""
        slot = self._slots.get(entry.tick)
        if slot is not None and slot.pop(entry, False) is None and not slot:
            del self._slots[entry.tick]

    def due(self, now: float) -> Iterator[Entry]:
        """Takes out, one by one, the entries whose ``gone_at`` has come, to the nearest second.

        The rest of the second that is going on comes with the next one: until then those entries
        are held, and never served.
        """
        for tick in self._ended_before(int(now / _TICK_S)):
            slot = self._slots.get(tick, {})
            while slot:
                entry, _ = slot.popitem()
                if not slot:
                    del self._slots[tick]
                yield entry

    def _ended_before(self, current: int) -> Iterator[int]:
        if current - self._next_tick > len(self._slots):
            yield from sorted(tick for tick in self._slots if tick < current)
            self._next_tick = current
            return
        while self._next_tick < current:
            yield self._next_tick
            self._next_tick += 1
