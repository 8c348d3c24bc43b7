"""A line of waiters: priority levels, fair shares, deadlines, a bounded size."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

from agent360.mesh.inference.queueing.fairness import FairShares
from agent360.mesh.inference.queueing.settings import MAX_LEVELS, QueueSettings
from agent360.mesh.inference.queueing.ticket import Ticket
from agent360.mesh.inference.queueing.waiters import Waiter

P = TypeVar("P")

_DELAYED: Final = MAX_LEVELS
"""The level behind all others, of those whose wait was too long."""
_PATIENCE_S: Final = 600.0
"""When one without deadline and timeout is due, in seconds after it came."""
_FEW: Final = 64


class LineFullError(Exception):
    """There is no room for one more; ``excess`` tokens have to go first."""

    def __init__(self, excess: int) -> None:
        super().__init__(f"{excess} tokens too many")
        self.excess = excess


class Line(Generic[P]):
    """Who waits, and who is next.

    The first level that has waiters is served; within it tenants share by weight, within a tenant
    the earliest deadline is first. A level in which somebody waited ``starvation_s`` gets every
    second turn, whatever waits above it: no level is starved longer than that and one turn, and no
    backlog of a lower level takes more than half of the turns of a higher one.

    Knows nothing of tasks and timers: time is an argument.

    Example:
        >>> line.enter(line.waiter(payload, ticket, now))
        >>> line.take(now)

    Attributes:
        settings: may be replaced at any time; those who wait keep their levels.
        size: how many wait.
        units: prompts or texts that they hold.
        cost: their tokens.
    """

    def __init__(self, settings: QueueSettings, weight_of: Callable[[str], float]) -> None:
        self.settings = settings
        self._weight_of = weight_of
        self._levels: list[FairShares[P]] = [FairShares() for _ in range(MAX_LEVELS + 1)]
        self._arrivals: list[OrderedDict[Waiter[P], None]] = [
            OrderedDict() for _ in range(MAX_LEVELS)
        ]
        self._expiries: list[tuple[float, int, Waiter[P]]] = []
        self._held: dict[str, int] = {}
        self._numbers = 0
        self._fattest = ""
        self._gave_way = False
        self.size = 0
        self.units = 0
        self.cost = 0

    def waiter(self, payload: P, ticket: Ticket, now: float, units: int = 1) -> Waiter[P]:
        """A waiter that has not entered yet."""
        self._numbers += 1
        waiter = Waiter(payload, ticket, now, self._numbers, units)
        settings = self.settings
        waiter.level = settings.level_of(ticket.priority)
        timeout = settings.timeout_s
        if ticket.timeout_s is not None and settings.allow_shorter_timeout:
            timeout = ticket.timeout_s if timeout is None else min(timeout, ticket.timeout_s)
        deadline = math.inf if ticket.deadline is None else ticket.deadline
        waiter.due = min(deadline, now + (_PATIENCE_S if timeout is None else timeout))
        ends = min(
            math.inf if timeout is None else now + timeout, math.inf if ticket.shared else deadline
        )
        waiter.expires = None if ends == math.inf else ends
        return waiter

    def enter(self, waiter: Waiter[P]) -> list[Waiter[P]]:
        """Lets a waiter in.

        Returns:
            Those that had to leave for it: the least urgent of the tenant that holds most.

        Raises:
            LineFullError: it is itself one of those with the least claim to wait.
        """
        settings = self.settings
        # One that is larger than the whole line may wait alone.
        full = self.size >= settings.max_items or (
            0 < settings.max_tokens < self.cost + waiter.cost and self.size > 0
        )
        gone = self._make_room(waiter) if full else []
        self._insert(waiter)
        self._expect(waiter)
        return gone

    def take(self, now: float) -> Waiter[P] | None:
        """Removes the next waiter, whose tenant is charged for it; None: nobody waits."""
        if not self.size:
            return None
        level, self._gave_way = self._next_level(now)
        waiter = self._levels[level].take()
        self._forget(waiter)
        return waiter

    def first(self, now: float) -> Waiter[P] | None:
        """Who ``take`` would remove."""
        return self._levels[self._next_level(now)[0]].first() if self.size else None

    def holds(self, tenant: str) -> bool:
        """Whether a tenant waits for something."""
        return tenant in self._held

    def got_less(self, tenant: str, than: Waiter[P]) -> bool:
        """Whether a tenant, if it came now at the level of another's, got no more than that one."""
        return self._levels[than.level].got_less(tenant, than.ticket.tenant)

    def put_back(self, waiter: Waiter[P]) -> None:
        """Undoes ``take``."""
        self._levels[waiter.level].put_back(waiter)
        self._remember(waiter)
        if 0 < waiter.level < _DELAYED:
            self._arrivals[waiter.level].move_to_end(waiter, last=False)
        self._expect(waiter)

    def leave(self, waiter: Waiter[P]) -> None:
        """Lets a waiter go, at no cost."""
        self._levels[waiter.level].remove(waiter)
        self._forget(waiter)

    def expire(self, now: float) -> list[Waiter[P]]:
        """Removes those whose wait is over; those with time until their deadline may be delayed."""
        gone: list[Waiter[P]] = []
        while self._expiries and (self._expiries[0][0] <= now or not _expected(self._expiries[0])):
            entry = heapq.heappop(self._expiries)
            waiter = entry[2]
            if not _expected(entry):
                continue
            deadline = None if waiter.ticket.shared else waiter.ticket.deadline
            over = deadline is not None and deadline <= now
            if over or self.settings.timeout_action == "reject":
                self.leave(waiter)
                gone.append(waiter)
                continue
            self.leave(waiter)
            waiter.level, waiter.due, waiter.expires = _DELAYED, math.inf, deadline
            self._insert(waiter)
            self._expect(waiter)
        return gone

    def next_expiry(self) -> float | None:
        """When ``expire`` has something to do next; None: never."""
        while self._expiries and not _expected(self._expiries[0]):
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def move_up(self, waiter: Waiter[P]) -> None:
        """Has one that waits do so at the level of its priority, if that is before its own."""
        level = self.settings.level_of(waiter.ticket.priority)
        if waiter.waiting and level < waiter.level:
            self.leave(waiter)
            waiter.level = level
            self._insert(waiter)

    def charge(self, waiter: Waiter[P]) -> None:
        """Charges a tenant for what it got without waiting."""
        tenant = waiter.ticket.tenant
        self._levels[waiter.level].charge(tenant, waiter.cost, self._weight_of(tenant))

    def correct(self, waiter: Waiter[P], by: int) -> None:
        """Charges what a waiter used beyond its estimate; negative: gives back."""
        tenant = waiter.ticket.tenant
        self._levels[waiter.level].correct(tenant, by, self._weight_of(tenant))

    def cost_ahead(self, waiter: Waiter[P]) -> float:
        """Tokens that go before a waiter that has not entered yet, about."""
        above = sum(shares.cost for shares in self._levels[: waiter.level])
        tenant = waiter.ticket.tenant
        own = self._levels[waiter.level]
        return above + own.cost_ahead(tenant, self._weight_of(tenant), waiter.due)

    def displaced(self, waiter: Waiter[P]) -> Iterator[tuple[Waiter[P], float, float]]:
        """Some of its tenant's that a waiter, if it entered, would be served before.

        Yields:
            Each, and the tokens that go before it, without and with the newcomer.
        """
        above = sum(shares.cost for shares in self._levels[: waiter.level])
        weight = self._weight_of(waiter.ticket.tenant)
        for each, without, with_it in self._levels[waiter.level].displaced(waiter, weight):
            yield each, above + without, above + with_it

    # ---------------------------------------------------------------- levels

    def _next_level(self, now: float) -> tuple[int, bool]:
        """The level that is served next, and whether one above it gives way to it."""
        level = next(at for at, shares in enumerate(self._levels) if shares.size)
        starving = None if self._gave_way else self._starving_below(level, now)
        return (level, False) if starving is None else (starving, True)

    def _insert(self, waiter: Waiter[P]) -> None:
        tenant = waiter.ticket.tenant
        self._levels[waiter.level].add(waiter, self._weight_of(tenant))
        self._remember(waiter)

    def _remember(self, waiter: Waiter[P]) -> None:
        waiter.waiting = True
        self.size += 1
        self.units += waiter.units
        self.cost += waiter.cost
        tenant = waiter.ticket.tenant
        held = self._held[tenant] = self._held.get(tenant, 0) + waiter.cost
        most = self._held.get(self._fattest, 0)
        if held * self._weight_of(self._fattest) > most * self._weight_of(tenant):
            self._fattest = tenant
        if 0 < waiter.level < _DELAYED:
            self._arrivals[waiter.level][waiter] = None

    def _forget(self, waiter: Waiter[P]) -> None:
        waiter.waiting = False
        self.size -= 1
        self.units -= waiter.units
        self.cost -= waiter.cost
        tenant = waiter.ticket.tenant
        left = self._held[tenant] - waiter.cost
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]
        if 0 < waiter.level < _DELAYED:
            self._arrivals[waiter.level].pop(waiter, None)

    def _starving_below(self, level: int, now: float) -> int | None:
        """The level below ``level`` in which somebody has waited too long, and the longest."""
        longest, found = now - self.settings.starvation_s, None
        for at in range(level + 1, MAX_LEVELS):
            arrivals = self._arrivals[at]
            if arrivals:
                came = next(iter(arrivals)).arrived
                if came <= longest:
                    longest, found = came, at
        return found

    # ---------------------------------------------------------------- expiry

    def _expect(self, waiter: Waiter[P]) -> None:
        if waiter.expires is None:
            return
        heapq.heappush(self._expiries, (waiter.expires, waiter.number, waiter))
        if len(self._expiries) > 2 * self.size + _FEW:
            self._expiries = [entry for entry in self._expiries if _expected(entry)]
            heapq.heapify(self._expiries)

    # ---------------------------------------------------------------- size

    def _make_room(self, waiter: Waiter[P]) -> list[Waiter[P]]:
        settings = self.settings
        tokens = settings.max_tokens
        excess = max(0, self.cost + waiter.cost - tokens) if tokens else 0
        items = max(0, self.size + 1 - settings.max_items)
        tenant, weight = waiter.ticket.tenant, self._weight_of(waiter.ticket.tenant)
        own = (self._held.get(tenant, 0) + waiter.cost) / weight
        if self._fattest != tenant:
            self._fattest = max(self._held, key=self._share, default=tenant)
        rich, left = self._fattest, self._share(self._fattest)
        gone: list[Waiter[P]] = []
        for level in range(_DELAYED, -1, -1):
            waiters = self._levels[level].waiters_of(rich)
            for each in waiters.from_last() if waiters is not None else ():
                if excess <= 0 and items <= 0:
                    break
                left -= each.cost / self._weight_of(rich)
                gives_way = level > waiter.level if rich == tenant else left >= own
                if not gives_way:
                    raise LineFullError(max(excess, waiter.cost))
                gone.append(each)
                excess -= each.cost
                items -= 1
        if excess > 0 or items > 0:
            raise LineFullError(max(excess, waiter.cost))
        for each in gone:
            self.leave(each)
        return gone

    def _share(self, tenant: str) -> float:
        return self._held.get(tenant, 0) / self._weight_of(tenant)


def _expected(entry: tuple[float, int, Waiter[P]]) -> bool:
    """Whether an entry still says when its waiter's wait ends."""
    waiter = entry[2]
    return waiter.waiting and waiter.expires == entry[0]
