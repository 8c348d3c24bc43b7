"""The waiters of one tenant, the most urgent first, and how much is ahead of a given urgency."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from agent360.mesh.inference.queueing.ticket import Ticket

P = TypeVar("P")

_CHUNK: Final = 32
_LAST: Final = 1 << 62


class Waiter(Generic[P]):
    """A request that waits.

    Attributes:
        payload: what waits.
        ticket: its size and urgency.
        cost: its size in tokens, at least 1.
        arrived: when it came, on the monotonic clock (seconds).
        expires: when its wait ends without a turn; None: never.
        due: when it should have begun; the earliest due goes first.
        level: its present level, from 0.
        units: how many prompts or texts it holds.
        waiting: whether it is in a line.
    """

    __slots__ = (
        "arrived", "cost", "due", "expires", "level", "number", "payload", "ticket", "units",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, payload: P, ticket: Ticket, arrived: float, number: int, units: int = 1
    ) -> None:
        self.payload = payload
        self.ticket = ticket
        self.cost = max(1, ticket.tokens)
        self.arrived = arrived
        self.number = number
        self.expires: float | None = None
        self.due = arrived
        self.level = 0
        self.units = units
        self.waiting = False

    @property
    def place(self) -> tuple[float, int]:
        """Where it stands among the waiters of its tenant."""
        return self.due, self.number


class ByUrgency(Generic[P]):
    """Waiters in the order of ``Waiter.place``.

    Kept in chunks with a sum each, so that entering, leaving and asking for the cost ahead look at
    the chunks' ends and at one chunk: microseconds at 10,000 waiters.
    """

    __slots__ = ("_chunks", "_costs", "_lasts", "cost", "size")

    def __init__(self) -> None:
        self._chunks: list[list[tuple[float, int, Waiter[P]]]] = []
        self._lasts: list[tuple[float, int]] = []
        self._costs: list[int] = []
        self.size = 0
        self.cost = 0

    def add(self, waiter: Waiter[P]) -> None:
        """Adds a waiter."""
        self.size += 1
        self.cost += waiter.cost
        entry = (waiter.due, waiter.number, waiter)
        if not self._chunks:
            self._chunks.append([entry])
            self._lasts.append(waiter.place)
            self._costs.append(waiter.cost)
            return
        at = min(bisect_left(self._lasts, waiter.place), len(self._chunks) - 1)
        chunk = self._chunks[at]
        insort(chunk, entry)
        self._costs[at] += waiter.cost
        self._lasts[at] = chunk[-1][:2]
        if len(chunk) > 2 * _CHUNK:
            self._split(at)

    def first(self) -> Waiter[P]:
        """The most urgent waiter; there must be one."""
        return self._chunks[0][0][2]

    def remove(self, waiter: Waiter[P]) -> None:
        """Removes a waiter that is here."""
        at = bisect_left(self._lasts, waiter.place)
        chunk = self._chunks[at]
        del chunk[bisect_left(chunk, waiter.place)]
        self.size -= 1
        self.cost -= waiter.cost
        if not chunk:
            del self._chunks[at], self._lasts[at], self._costs[at]
            return
        self._costs[at] -= waiter.cost
        self._lasts[at] = chunk[-1][:2]

    def cost_until(self, due: float) -> int:
        """The cost of those that are due at ``due`` or before."""
        at = bisect_right(self._lasts, (due, _LAST))
        ahead = sum(self._costs[:at])
        if at < len(self._chunks):
            chunk = self._chunks[at]
            inside = bisect_right(chunk, (due, _LAST))
            ahead += sum(entry[2].cost for entry in chunk[:inside])
        return ahead

    def milestones(self, due: float) -> Iterator[tuple[Waiter[P], int]]:
        """Those due at ``due`` or later; of more than a chunk full, one in 50 and the last.

        Yields:
            Each, and the cost of those before it.
        """
        at = bisect_left(self._lasts, (due, 0))
        until = sum(self._costs[:at])
        if self.size <= _CHUNK:
            for chunk in self._chunks[at:]:
                for entry in chunk:
                    if entry[0] >= due:
                        yield entry[2], until
                    until += entry[2].cost
            return
        for chunk, cost in zip(self._chunks[at:], self._costs[at:], strict=True):
            until += cost
            last = chunk[-1][2]
            yield last, until - last.cost

    def from_last(self) -> Iterator[Waiter[P]]:
        """The waiters, the least urgent first."""
        for chunk in reversed(self._chunks):
            for entry in reversed(chunk):
                yield entry[2]

    def _split(self, at: int) -> None:
        chunk = self._chunks[at]
        right = chunk[_CHUNK:]
        del chunk[_CHUNK:]
        moved = sum(entry[2].cost for entry in right)
        self._chunks.insert(at + 1, right)
        self._lasts[at] = chunk[-1][:2]
        self._lasts.insert(at + 1, right[-1][:2])
        self._costs[at] -= moved
        self._costs.insert(at + 1, moved)
