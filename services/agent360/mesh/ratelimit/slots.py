"""Concurrency slots: held by name until they are released or their time is over."""

from __future__ import annotations

import heapq
from typing import NamedTuple


class _Held(NamedTuple):
    slots: int
    ends: int


class SlotPool:
    """At most ``amount`` slots held at a time.

    Invariant: ``_used`` is the sum of the slots in ``_held``. ``_ends`` may have entries of what
    was released or renewed; they are dropped when their time comes.
    """

    __slots__ = ("_amount", "_ends", "_held", "_used")

    def __init__(self, amount: int) -> None:
        self._amount = amount
        self._held: dict[str, _Held] = {}
        self._ends: list[tuple[int, str]] = []
        self._used = 0

    def room(self, now: int) -> int:
        """How many slots are free."""
        while self._ends and self._ends[0][0] <= now:
            ends, holder = heapq.heappop(self._ends)
            held = self._held.get(holder)
            if held is not None and held.ends == ends:
                self.release(holder)
        return self._amount - self._used

    def hold(self, now: int, holder: str, slots: int, ttl_us: int) -> None:
        """Takes slots without asking whether they are free."""
        self.room(now)
        self._held[holder] = _Held(slots, now + ttl_us)
        self._used += slots
        heapq.heappush(self._ends, (now + ttl_us, holder))

    def renew(self, now: int, holder: str, ttl_us: int) -> bool:
        """Keeps slots for longer; False if they had come back."""
        self.room(now)
        held = self._held.get(holder)
        if held is None:
            return False
        self._held[holder] = held._replace(ends=now + ttl_us)
        heapq.heappush(self._ends, (now + ttl_us, holder))
        if len(self._ends) > 4 * len(self._held) + 64:
            self._ends = [(each.ends, name) for name, each in self._held.items()]
            heapq.heapify(self._ends)
        return True

    def release(self, holder: str) -> bool:
        """Gives slots back; False if they had come back."""
        held = self._held.pop(holder, None)
        if held is None:
            return False
        self._used -= held.slots
        return True

    def holds(self, now: int, holder: str) -> bool:
        """Whether a holder's slots have not come back."""
        self.room(now)
        return holder in self._held

    def wait(self, now: int, slots: int) -> int | None:
        """Microseconds until so many are free if nobody releases or renews; None: never."""
        if slots > self._amount:
            return None
        missing = slots - self.room(now)
        if missing <= 0:
            return 0
        for held in sorted(self._held.values(), key=lambda each: each.ends):
            missing -= held.slots
            if missing <= 0:
                return held.ends - now
        return None

    def reset(self, now: int) -> int:
        """Microseconds until all are free if nobody renews."""
        self.room(now)
        return max((held.ends for held in self._held.values()), default=now) - now

    def resize(self, amount: int) -> None:
        """Counts against another amount from now on."""
        self._amount = amount
