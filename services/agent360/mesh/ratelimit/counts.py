"""The counts that a request is charged to, and which of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from agent360.mesh.ratelimit.counters import Counter
from agent360.mesh.ratelimit.limits import PLAN, TENANT, Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.slots import SlotPool

CountKey = tuple[str, ...]
"""Limit id, tenant and plan of the limit, kind, and the values of the facts it counts by."""


class Charge:
    """One count that requests are charged to."""

    __slots__ = ("counter", "denied", "least", "limit", "limit_id", "pool", "shadow", "size")

    def __init__(self, limit: Limit) -> None:
        self.denied = 0
        """Requests that it denied; of a shadow limit, would have."""
        self.least = limit.size
        """The least room that was left."""
        self.counter: Counter
        self.pool: SlotPool
        if limit.algorithm is Algorithm.CONCURRENCY:
            self.pool = SlotPool(limit.amount)
        else:
            self.counter = limit.counter()
        self.adopt(limit)

    def adopt(self, limit: Limit) -> None:
        """Counts for a changed limit of the same kind."""
        if limit.algorithm is Algorithm.CONCURRENCY:
            self.pool.resize(limit.amount)
        else:
            self.counter.resize(limit.amount, limit.size)
        self.limit = limit
        self.limit_id = limit.limit_id
        self.size = limit.size
        self.shadow = limit.shadow


Plan = tuple[Charge, ...]
"""The counts that a request is charged to."""


def counts_of(
    limits: LimitSet,
    tenant: str,
    name: str,
    facts: Mapping[str, str],
    *,
    slots: bool = False,
    own: bool = False,
) -> list[tuple[Limit, CountKey]]:
    """The limits that a request is subject to, and the keys of their counts; see Limiter.plan."""
    known = {**facts, TENANT: tenant, PLAN: limits.plan_of(tenant)}
    return [
        (limit, (*limit.key, limit.kind, *(known.get(fact, "") for fact in limit.per)))
        for limit in limits.matching(tenant, name, known)
        if (limit.algorithm is Algorithm.CONCURRENCY) is slots
        and (not own or limit.names_own_methods)
    ]


def tightest_of(plan: Plan, rooms: Sequence[int], hits: int) -> tuple[Charge, int]:
    """The count with the least room; where only shadow limits apply, one with just enough."""
    found: tuple[Charge, int] | None = None
    for charge, room in zip(plan, rooms, strict=True):
        if not charge.shadow and (found is None or room < found[1]):
            found = charge, room
    return found or (plan[0], max(1, hits))


def longest_of(
    waits: Sequence[tuple[int | None, Charge]], tightest: Charge
) -> tuple[int | None, Charge]:
    """The longest wait and whose it is; None: it never fits."""
    longest: int | None = 0
    for wait, charge in waits:
        if wait is None:
            return None, charge
        if longest is not None and wait > longest:
            longest, tightest = wait, charge
    return longest, tightest
