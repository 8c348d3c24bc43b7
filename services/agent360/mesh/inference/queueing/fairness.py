"""Who is next of several tenants: each gets its share of the tokens, by weight."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

from agent360.mesh.inference.queueing.waiters import ByUrgency, Waiter

P = TypeVar("P")

_FEW: Final = 64


class _Flow(Generic[P]):
    """What one tenant waits for, and what it got.

    ``used`` is its tokens by weight on the level's clock. A flow with waiters has exactly one
    entry in the heap that holds its present ``stamp``.
    """

    __slots__ = ("stamp", "used", "waiters", "weight")

    def __init__(self, used: float, weight: float) -> None:
        self.used = used
        self.weight = weight
        self.stamp = 0
        self.waiters: ByUrgency[P] = ByUrgency()


class FairShares(Generic[P]):
    """Weighted deficit round robin over tenants by tokens, with a quantum that goes to zero.

    A round robin with a quantum serves up to a quantum of one tenant in a row, and has to visit
    every tenant as often as the largest item has quanta. In the limit the next to be served is the
    tenant that got the fewest tokens for its weight, which a heap tells in O(log tenants): start
    time fair queueing (Goyal, Vin, Cheng 1996). While two tenants both wait, what they got for
    their weights differs by at most one item each.

    A tenant that comes (back) starts at the clock, the share of the one last served: idling saves
    up nothing. What it used beyond its estimates stays owed.

    Example:
        >>> shares.add(waiter, weight=2.0)
        >>> shares.take()
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow[P]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._clock = 0.0
        self._stamps = 0
        self._weight_waiting = 0.0
        self._sweep_at = _FEW
        self._flows_waiting = 0
        self.size = 0
        self.cost = 0

    def add(self, waiter: Waiter[P], weight: float) -> None:
        """Adds a waiter of a tenant of this weight."""
        flow = self._flow(waiter.ticket.tenant, weight)
        if not flow.waiters.size:
            flow.used = max(flow.used, self._clock)
            self._flows_waiting += 1
            self._weight_waiting += flow.weight
            self._enlist(waiter.ticket.tenant, flow)
        flow.waiters.add(waiter)
        self.size += 1
        self.cost += waiter.cost

    def first(self) -> Waiter[P]:
        """The waiter whose turn it is; there must be one."""
        while True:
            _, stamp, tenant = self._heap[0]
            flow = self._flows.get(tenant)
            if flow is not None and flow.waiters.size and flow.stamp == stamp:
                return flow.waiters.first()
            heapq.heappop(self._heap)

    def take(self) -> Waiter[P]:
        """Removes and charges the waiter whose turn it is; there must be one."""
        waiter = self.first()
        used, _, tenant = heapq.heappop(self._heap)
        flow = self._flows[tenant]
        self._clock = max(self._clock, used)
        flow.used = used + waiter.cost / flow.weight
        self._removed(waiter, flow)
        if flow.waiters.size:
            self._enlist(tenant, flow)
        return waiter

    def put_back(self, waiter: Waiter[P]) -> None:
        """Undoes ``take``."""
        tenant = waiter.ticket.tenant
        flow = self._flows[tenant]
        flow.used -= waiter.cost / flow.weight
        if not flow.waiters.size:
            self._flows_waiting += 1
            self._weight_waiting += flow.weight
        self._enlist(tenant, flow)
        flow.waiters.add(waiter)
        self.size += 1
        self.cost += waiter.cost

    def remove(self, waiter: Waiter[P]) -> None:
        """Removes a waiter, which costs its tenant nothing."""
        self._removed(waiter, self._flows[waiter.ticket.tenant])

    def charge(self, tenant: str, cost: float, weight: float) -> None:
        """Charges what was served without waiting."""
        flow = self._flow(tenant, weight)
        used = max(flow.used, self._clock)
        self._clock = used
        flow.used = used + cost / flow.weight

    def correct(self, tenant: str, by: float, weight: float) -> None:
        """Charges what was used beyond the estimate; negative: gives back what was not used."""
        flow = self._flow(tenant, weight)
        flow.used += by / flow.weight
        if flow.waiters.size:
            self._enlist(tenant, flow)

    def got_less(self, tenant: str, than: str) -> bool:
        """Whether a tenant that comes now got no more for its weight than another."""
        one, other = self._flows.get(tenant), self._flows.get(than)
        start = self._clock if one is None else max(one.used, self._clock)
        return start <= (self._clock if other is None else max(other.used, self._clock))

    def waiters_of(self, tenant: str) -> ByUrgency[P] | None:
        """What a tenant waits for; None: nothing."""
        flow = self._flows.get(tenant)
        return flow.waiters if flow is not None and flow.waiters.size else None

    def cost_ahead(self, tenant: str, weight: float, due: float) -> float:
        """Tokens that are served before one of ``tenant`` that is due at ``due``, about."""
        own = self.waiters_of(tenant)
        before = own.cost_until(due) if own is not None else 0
        return self._with_shares(tenant, weight, before)

    def displaced(
        self, waiter: Waiter[P], weight: float
    ) -> Iterator[tuple[Waiter[P], float, float]]:
        """Some of those that would be served later if a waiter entered.

        Yields:
            Each, and the tokens that go before it, without and with the newcomer.
        """
        tenant = waiter.ticket.tenant
        own = self.waiters_of(tenant)
        if own is None:
            return
        for each, until in own.milestones(waiter.due):
            yield (
                each,
                self._with_shares(tenant, weight, until),
                self._with_shares(tenant, weight, until + waiter.cost),
            )

    def _with_shares(self, tenant: str, weight: float, cost: float) -> float:
        """``cost`` tokens of one tenant and the shares that others get meanwhile.

        What the tenant got beyond its share they get first; nobody gets more than it waits for.
        """
        flow = self._flows.get(tenant)
        others, other_weights, ahead = float(self.cost), self._weight_waiting, 0.0
        if flow is not None:
            ahead = max(0.0, flow.used - self._clock)
            if flow.waiters.size:
                others -= flow.waiters.cost
                other_weights -= weight
        return cost + min(others, (ahead + cost / weight) * other_weights)

    def _flow(self, tenant: str, weight: float) -> _Flow[P]:
        flow = self._flows.get(tenant)
        if flow is None:
            self._sweep()
            flow = self._flows[tenant] = _Flow(self._clock, weight)
        elif flow.weight != weight:
            if flow.waiters.size:
                self._weight_waiting += weight - flow.weight
            flow.weight = weight
        return flow

    def _removed(self, waiter: Waiter[P], flow: _Flow[P]) -> None:
        flow.waiters.remove(waiter)
        self.size -= 1
        self.cost -= waiter.cost
        if not flow.waiters.size:
            self._flows_waiting -= 1
            self._weight_waiting -= flow.weight

    def _enlist(self, tenant: str, flow: _Flow[P]) -> None:
        self._stamps += 1
        flow.stamp = self._stamps
        heapq.heappush(self._heap, (flow.used, flow.stamp, tenant))
        if len(self._heap) > 2 * self._flows_waiting + _FEW:
            self._heap = [
                (each.used, each.stamp, name)
                for name, each in self._flows.items()
                if each.waiters.size or name == tenant
            ]
            heapq.heapify(self._heap)

    def _sweep(self) -> None:
        """Forgets tenants that wait for nothing and owe nothing, now and then."""
        if len(self._flows) < self._sweep_at:
            return
        for name, flow in list(self._flows.items()):
            if not flow.waiters.size and flow.used <= self._clock:
                del self._flows[name]
        self._sweep_at = max(_FEW, 2 * len(self._flows))
