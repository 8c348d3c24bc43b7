"""Counts of what was used: token bucket, sliding window, fixed window.

Each has a twin in Lua beside the Redis store that does the same arithmetic. All times are whole
microseconds since 1970, given by the caller; hits are whole numbers. Python's integers and Lua's
doubles agree as long as a bucket's debt, hits x period in microseconds, stays below 2**53; beyond,
Lua rounds to one part in 2**53.

``room`` says how many hits fit now, ``take`` charges without asking (more than fits, too: a settled
excess) and returns a mark, ``give_back`` undoes what was charged under a mark as far as it still
counts, ``admit`` charges if there is room, ``wait`` says when ``hits`` would fit (None: never),
``reset`` when the count is whole again.

A clock that steps back never makes a count forget: what was used is carried over to the new time.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

from agent360.mesh.ratelimit.windows import Windows

SLOTS: Final = 16
"""Parts that a sliding window is counted in."""


class Counter(Protocol):
    """One count of one limit."""

    def room(self, now: int) -> int:
        """How many hits fit now; negative after an excess was charged."""

    def take(self, now: int, hits: int) -> int:
        """Charges hits; returns the mark to give them back by."""

    def admit(self, now: int, hits: int) -> tuple[int, int] | None:
        """Charges hits if they fit; returns the room left and ``reset``, or None."""

    def give_back(self, now: int, hits: int, mark: int, charged: int) -> None:
        """Undoes ``hits`` of the ``charged`` ones, so far as they still count."""

    def wait(self, now: int, hits: int) -> int | None:
        """Microseconds until ``hits`` fit; None if they never do."""

    def reset(self, now: int) -> int:
        """Microseconds until the count is whole again."""

    def lease_us(self, now: int) -> int | None:
        """How long hits charged now may be spent without breaking the limit; None: see lease."""

    def resize(self, amount: int, burst: int) -> None:
        """Counts against another amount from now on."""


class TokenBucket:
    """GCRA (ATM Forum TM 4.0): at most burst + rate x dt hits in any dt.

    Invariant: ``_debt`` is what was taken and has not flowed back by ``_at``, in hits times the
    period; ``amount`` of it flow back each microsecond. What was taken before ``_since`` has
    flowed back wholly; what was taken later, never faster than at ``_fastest``, whatever the
    amount was changed to in between.
    """

    __slots__ = ("_amount", "_at", "_burst", "_debt", "_fastest", "_period_us", "_since")

    def __init__(self, amount: int, period_us: int, burst: int) -> None:
        self._amount = amount
        self._period_us = period_us
        self._burst = burst
        self._at = self._since = 0
        self._debt = 0
        self._fastest = amount

    def room(self, now: int) -> int:
        """See ``Counter.room``."""
        return (self._burst * self._period_us - self._left(now)) // self._period_us

    def take(self, now: int, hits: int) -> int:
        """See ``Counter.take``; the mark is the time."""
        self._flow(now)
        self._debt += hits * self._period_us
        return now

    def admit(self, now: int, hits: int) -> tuple[int, int] | None:
        """See ``Counter.admit``; most requests of most services end here."""
        period_us, amount = self._period_us, self._amount
        owed = self._debt
        if owed:
            elapsed = now - self._at
            if elapsed > 0:
                owed -= elapsed * amount
                if owed < 0:
                    owed = 0
        debt = owed + hits * period_us
        left = (self._burst * period_us - debt) // period_us
        if left < 0:
            return None
        if not owed:
            self._since, self._fastest = now, amount
        elif amount > self._fastest:
            self._fastest = amount
        self._at = now
        self._debt = debt
        return left, -(-debt // amount)

    def give_back(self, now: int, hits: int, mark: int, charged: int) -> None:
        """See ``Counter.give_back``; what has flowed back since is not given twice.

        All that flowed since the charge counts as its own, though debts of others may have stood
        in front, and at the fastest that the limit was meanwhile: too little may be given back,
        never too much. Nothing is if the clock went back behind the charge.
        """
        self._flow(now)
        if now < mark or mark < self._since:
            return
        undone = min(
            hits * self._period_us, charged * self._period_us - (now - mark) * self._fastest
        )
        if undone > 0:
            self._debt = max(0, self._debt - undone)

    def wait(self, now: int, hits: int) -> int | None:
        """See ``Counter.wait``."""
        if hits > self._burst:
            return None
        over = self._left(now) - (self._burst - hits) * self._period_us
        return -(-over // self._amount) if over > 0 else 0

    def reset(self, now: int) -> int:
        """See ``Counter.reset``."""
        return -(-self._left(now) // self._amount)

    def lease_us(self, now: int) -> int | None:  # noqa: ARG002 - the interface is shared
        """See ``Counter.lease_us``: hits spent late add at most rate x lease time."""
        return None

    def resize(self, amount: int, burst: int) -> None:
        """See ``Counter.resize``."""
        self._amount, self._burst = amount, burst

    def _left(self, now: int) -> int:
        """What of the debt is left; looking changes nothing, unless the clock stepped back."""
        elapsed = now - self._at
        if elapsed < 0:
            self._at = now
        elif self._debt:
            return max(0, self._debt - elapsed * self._amount)
        return self._debt

    def _flow(self, now: int) -> None:
        self._debt = self._left(now)
        self._at = now
        if not self._debt:
            self._since, self._fastest = now, self._amount
        elif self._amount > self._fastest:
            self._fastest = self._amount


class SlidingWindow:
    """At most ``amount`` hits in any period, counted in sixteenths of it.

    A hit is forgotten only when the whole sixteenth it fell into is a period old, so no more than
    ``amount`` are ever admitted, and room comes back at most a sixteenth of a period late.
    """

    __slots__ = ("_amount", "_period_us", "_slot_us", "_slots", "_used")

    def __init__(self, amount: int, period_us: int) -> None:
        self._amount = amount
        self._period_us = period_us
        self._slot_us = -(-period_us // SLOTS)
        self._slots: deque[list[int]] = deque()
        self._used = 0

    def room(self, now: int) -> int:
        """See ``Counter.room``."""
        self._slide(now)
        return self._amount - self._used

    def take(self, now: int, hits: int) -> int:
        """See ``Counter.take``; the mark is the slot."""
        slot = self._slide(now)
        if hits:
            if self._slots and self._slots[-1][0] == slot:
                self._slots[-1][1] += hits
            else:
                self._slots.append([slot, hits])
            self._used += hits
        return slot

    def admit(self, now: int, hits: int) -> tuple[int, int] | None:
        """See ``Counter.admit``."""
        left = self.room(now) - hits
        if left < 0:
            return None
        self.take(now, hits)
        return left, self.reset(now)

    def give_back(self, now: int, hits: int, mark: int, charged: int) -> None:  # noqa: ARG002 - shared
        """See ``Counter.give_back``; only from the slot that was charged."""
        self._slide(now)
        for slot in self._slots:
            if slot[0] == mark:
                undone = min(hits, slot[1])
                slot[1] -= undone
                self._used -= undone

    def wait(self, now: int, hits: int) -> int | None:
        """See ``Counter.wait``."""
        if hits > self._amount:
            return None
        missing = hits - self.room(now)
        if missing <= 0:
            return 0
        for slot, count in self._slots:
            missing -= count
            if missing <= 0:
                return self._forgotten_at(slot) - now
        return self._period_us

    def reset(self, now: int) -> int:
        """See ``Counter.reset``."""
        self._slide(now)
        return self._forgotten_at(self._slots[-1][0]) - now if self._used else 0

    def lease_us(self, now: int) -> int | None:
        """See ``Counter.lease_us``: until the slot ends."""
        return (now // self._slot_us + 1) * self._slot_us - now

    def resize(self, amount: int, burst: int) -> None:  # noqa: ARG002 - the interface is shared
        """See ``Counter.resize``."""
        self._amount = amount

    def _slide(self, now: int) -> int:
        """Forgets what is a period old; returns the present slot."""
        slots, slot = self._slots, now // self._slot_us
        if slots and slots[-1][0] > slot:  # the clock stepped back
            ahead = slots[-1][0] - slot
            for each in slots:
                each[0] -= ahead
        while slots and self._forgotten_at(slots[0][0]) <= now:
            self._used -= slots.popleft()[1]
        return slot

    def _forgotten_at(self, slot: int) -> int:
        return (slot + 1) * self._slot_us + self._period_us


class FixedWindow:
    """At most ``amount`` hits in each window.

    Where the clock steps back into an earlier window, the later one is counted on, at most until
    the end of the window after the present one.
    """

    __slots__ = ("_amount", "_end", "_start", "_used", "_windows")

    def __init__(self, amount: int, windows: Windows) -> None:
        self._amount = amount
        self._windows = windows
        self._start = self._end = 0
        self._used = 0

    def room(self, now: int) -> int:
        """See ``Counter.room``."""
        self._turn(now)
        return self._amount - self._used

    def take(self, now: int, hits: int) -> int:
        """See ``Counter.take``; the mark is the window's start."""
        self._turn(now)
        self._used += hits
        return self._start

    def admit(self, now: int, hits: int) -> tuple[int, int] | None:
        """See ``Counter.admit``."""
        self._turn(now)
        left = self._amount - self._used - hits
        if left < 0:
            return None
        self._used += hits
        return left, self._end - now if self._used else 0

    def give_back(self, now: int, hits: int, mark: int, charged: int) -> None:  # noqa: ARG002 - shared
        """See ``Counter.give_back``; what was charged in an earlier window is gone with it."""
        self._turn(now)
        if mark == self._start:
            self._used = max(0, self._used - hits)

    def wait(self, now: int, hits: int) -> int | None:
        """See ``Counter.wait``."""
        if hits > self._amount:
            return None
        return 0 if hits <= self.room(now) else self._end - now

    def reset(self, now: int) -> int:
        """See ``Counter.reset``."""
        self._turn(now)
        return self._end - now if self._used else 0

    def lease_us(self, now: int) -> int | None:
        """See ``Counter.lease_us``: until the window ends."""
        self._turn(now)
        return self._end - now

    def resize(self, amount: int, burst: int) -> None:  # noqa: ARG002 - the interface is shared
        """See ``Counter.resize``."""
        self._amount = amount

    def _turn(self, now: int) -> None:
        if self._start <= now < self._end:
            return
        start, end = self._windows.at(now)
        if start < self._start and self._used:  # the clock stepped back
            after = self._windows.at(end)
            if self._start > after[0]:
                self._start, self._end = after
            return
        self._start, self._end = start, end
        self._used = 0
