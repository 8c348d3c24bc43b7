"""Counts of what was used: token bucket, sliding window, fixed window.

All take the time from their caller, in seconds; hits are whole numbers. ``room`` says how many hits
fit now, ``take`` charges without asking (more than fits, too: a settled excess), ``give_back``
undoes, ``admit`` charges if there is room, ``wait`` says when ``hits`` would fit (None: never),
``reset`` when the count is whole again.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

_EPSILON: Final = 1e-6
"""Share of a hit that rounding may cost; waits are longer by it, so that they are true."""

_SLOTS: Final = 16


class Counter(Protocol):
    """One count of one limit."""

    def room(self, now: float) -> int:
        """How many hits fit now; negative after an excess was charged."""

    def take(self, now: float, hits: int) -> None:
        """Charges hits."""

    def admit(self, now: float, hits: int) -> tuple[int, float] | None:
        """Charges hits if they fit; returns the room left and ``reset``, or None."""

    def give_back(self, now: float, hits: int) -> None:
        """Undoes a charge."""

    def wait(self, now: float, hits: int) -> float | None:
        """Seconds until ``hits`` fit; None if they never do."""

    def reset(self, now: float) -> float:
        """Seconds until the count is whole again."""


class TokenBucket:
    """GCRA (ATM Forum TM 4.0, virtual scheduling): at most burst + rate x dt hits in any dt.

    Invariant: ``_full_at`` is when the bucket is full again if nothing more is taken.
    """

    __slots__ = ("_burst", "_full_at", "_interval_s")

    def __init__(self, amount: int, period_s: float, burst: int) -> None:
        self._interval_s = period_s / amount
        self._burst = burst
        self._full_at = 0.0

    def room(self, now: float) -> int:
        """See ``Counter.room``."""
        behind = self._full_at - now
        if behind <= 0:
            return self._burst
        return int((self._burst - behind / self._interval_s + _EPSILON) // 1)

    def take(self, now: float, hits: int) -> None:
        """See ``Counter.take``."""
        start = max(now, self._full_at)
        self._full_at = start + hits * self._interval_s

    def admit(self, now: float, hits: int) -> tuple[int, float] | None:
        """See ``Counter.admit``; most requests of most services end here."""
        interval_s, full_at = self._interval_s, self._full_at
        behind = (full_at - now if full_at > now else 0.0) + hits * interval_s
        left = int((self._burst - behind / interval_s + _EPSILON) // 1)
        if left < 0:
            return None
        self._full_at = now + behind
        return left, behind

    def give_back(self, now: float, hits: int) -> None:
        """See ``Counter.give_back``."""
        self._full_at = max(now, self._full_at - hits * self._interval_s)

    def wait(self, now: float, hits: int) -> float | None:
        """See ``Counter.wait``."""
        if hits > self._burst:
            return None
        behind = max(0.0, self._full_at - now)
        return max(0.0, behind - (self._burst - hits) * self._interval_s)

    def reset(self, now: float) -> float:
        """See ``Counter.reset``."""
        return max(0.0, self._full_at - now)


class SlidingWindow:
    """At most ``amount`` hits in any period, counted in sixteenths of it.

    A hit is forgotten only when the whole sixteenth it fell into is a period old, so no more than
    ``amount`` are ever admitted, and room comes back at most a sixteenth of a period late.
    """

    __slots__ = ("_amount", "_period_s", "_slot_s", "_slots", "_used")

    def __init__(self, amount: int, period_s: float) -> None:
        self._amount = amount
        self._period_s = period_s
        self._slot_s = period_s / _SLOTS
        self._slots: deque[list[int]] = deque()
        self._used = 0

    def room(self, now: float) -> int:
        """See ``Counter.room``."""
        slots = self._slots
        while slots and self._forgotten_at(slots[0][0]) <= now:
            self._used -= slots.popleft()[1]
        return self._amount - self._used

    def take(self, now: float, hits: int) -> None:
        """See ``Counter.take``."""
        slot = int(now // self._slot_s)
        if self._slots and self._slots[-1][0] >= slot:
            self._slots[-1][1] += hits
        else:
            self._slots.append([slot, hits])
        self._used += hits

    def admit(self, now: float, hits: int) -> tuple[int, float] | None:
        """See ``Counter.admit``."""
        left = self.room(now) - hits
        if left < 0:
            return None
        self.take(now, hits)
        return left, self._forgotten_at(self._slots[-1][0]) - now

    def give_back(self, now: float, hits: int) -> None:
        """See ``Counter.give_back``; the youngest hits first."""
        self.room(now)
        for slot in reversed(self._slots):
            undone = min(hits, slot[1])
            slot[1] -= undone
            self._used -= undone
            hits -= undone

    def wait(self, now: float, hits: int) -> float | None:
        """See ``Counter.wait``."""
        if hits > self._amount:
            return None
        missing = hits - self.room(now)
        if missing <= 0:
            return 0.0
        for slot, count in self._slots:
            missing -= count
            if missing <= 0:
                return self._forgotten_at(slot) - now
        return self._period_s

    def reset(self, now: float) -> float:
        """See ``Counter.reset``."""
        self.room(now)
        return self._forgotten_at(self._slots[-1][0]) - now if self._slots else 0.0

    def _forgotten_at(self, slot: int) -> float:
        return (slot + 1) * self._slot_s + self._period_s


class FixedWindow:
    """At most ``amount`` hits in each period; periods begin at multiples of it."""

    __slots__ = ("_amount", "_period_s", "_used", "_window")

    def __init__(self, amount: int, period_s: float) -> None:
        self._amount = amount
        self._period_s = period_s
        self._window = -1
        self._used = 0

    def room(self, now: float) -> int:
        """See ``Counter.room``."""
        window = int(now // self._period_s)
        if window != self._window:
            self._window, self._used = window, 0
        return self._amount - self._used

    def take(self, now: float, hits: int) -> None:
        """See ``Counter.take``."""
        self.room(now)
        self._used += hits

    def admit(self, now: float, hits: int) -> tuple[int, float] | None:
        """See ``Counter.admit``."""
        left = self.room(now) - hits
        if left < 0:
            return None
        self._used += hits
        return left, self._end() - now

    def give_back(self, now: float, hits: int) -> None:
        """See ``Counter.give_back``; what was charged in an earlier period is gone with it."""
        self.room(now)
        self._used = max(0, self._used - hits)

    def wait(self, now: float, hits: int) -> float | None:
        """See ``Counter.wait``."""
        if hits > self._amount:
            return None
        return 0.0 if hits <= self.room(now) else self._end() - now

    def reset(self, now: float) -> float:
        """See ``Counter.reset``."""
        self.room(now)
        return self._end() - now if self._used else 0.0

    def _end(self) -> float:
        return (self._window + 1) * self._period_s
