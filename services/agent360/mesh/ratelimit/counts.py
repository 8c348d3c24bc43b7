"""The counts that a request is charged to, and which of them decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from agent360.mesh.ratelimit.counters import Counter
from agent360.mesh.ratelimit.limits import PLAN, TENANT, Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.slots import SlotPool

CountKey = tuple[str, ...]
"""Limit id, tenant and plan of the limit, kind, and the values of the facts it counts by."""


class Charge:
    """One count that requests are charged to, or a tenant's share of one.

    A share counts with its ``whole``, together with the other tenants, and is told apart only in
    usage. Invariant: ``peak`` and ``charged`` are those of the period of ``began`` and ``ends``.
    """

    __slots__ = (
        "_own",
        "_periods",
        "began",
        "charged",
        "counter",
        "denied",
        "ends",
        "limit",
        "limit_id",
        "peak",
        "plain",
        "pool",
        "shadow",
        "shares",
        "size",
        "whole",
    )

    def __init__(self, limit: Limit, whole: Charge | None = None) -> None:
        """Makes a count that nothing was charged to.

        Args:
            limit: that it counts for.
            whole: of which it is a share.
        """
        self.denied = 0
        """Requests that it denied; of a shadow limit, would have."""
        self.peak = 0
        """The largest use seen in the period."""
        self.charged = 0
        """What a share's tenant was charged in the period."""
        self.began = self.ends = 0
        """The period that ``peak`` and ``charged`` are of."""
        self.whole = whole
        self.shares: dict[str, Charge] = {}
        """By tenant, of a limit that counts several together."""
        self.counter: Counter
        self.pool: SlotPool
        slots = limit.algorithm is Algorithm.CONCURRENCY
        if slots:
            self.pool = whole.pool if whole else SlotPool(limit.amount)
            self._own = SlotPool(0)
        else:
            self.counter = whole.counter if whole else limit.counter()
        self._periods = limit.periods()
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
        self.plain = self.whole is None and not limit.shadow
        """Whether it decides, and is nobody's share."""
        for share in self.shares.values():
            share.adopt(limit)

    def turn(self, now: int) -> None:
        """Begins the period of a time, if it is another."""
        if not self.began <= now < self.ends:
            self.began, self.ends = self._periods.at(now)
            self.peak = self.charged = 0

    def hold(self, now: int, holder: str, slots: int, ttl_us: int) -> None:
        """Takes slots without asking whether they are free."""
        self.pool.hold(now, holder, slots, ttl_us)
        if self.whole is not None:
            self._own.hold(now, holder, slots, ttl_us)
            self.turn(now)
            self.peak = max(self.peak, self.held(now))

    def renew(self, now: int, holder: str, ttl_us: int) -> bool:
        """Keeps slots for longer; False if they had come back."""
        if self.whole is not None:
            self._own.renew(now, holder, ttl_us)
        return self.pool.renew(now, holder, ttl_us)

    def release(self, now: int, holder: str) -> bool:
        """Gives slots back; False if they had come back."""
        if self.whole is not None:
            self._own.release(holder)
        self.pool.room(now)
        return self.pool.release(holder)

    def held(self, now: int) -> int:
        """How many slots a share's tenant holds."""
        return -self._own.room(now)

    def note_charge(self, now: int, hits: int, used: int) -> None:
        """Notes that hits were charged, and how much of the count is used with them."""
        self.turn(now)
        whole = self.whole
        if whole is not None:
            self.charged += hits
            if self.charged > self.peak:
                self.peak = self.charged
            whole.turn(now)
            whole.peak = max(whole.peak, used)
        else:
            self.peak = max(self.peak, used)

    def note_adjustment(self, now: int, hits: int, charged_at: int) -> None:
        """Notes that more was charged, or some of what was charged at a time given back."""
        self.turn(now)
        if self.whole is not None and (hits > 0 or charged_at >= self.began):
            self.charged = max(0, self.charged + hits)

    def note_denial(self) -> None:
        """Notes that it denied a request."""
        self.denied += 1
        if self.whole is not None:
            self.whole.denied += 1

    def share_of(self, tenant: str) -> Charge:
        """A tenant's share of it."""
        share = self.shares.get(tenant)
        if share is None:
            if len(self.shares) >= _MAX_SHARES:
                del self.shares[next(iter(self.shares))]
            share = self.shares[tenant] = Charge(self.limit, self)
        return share


_MAX_SHARES: Final = 10_000


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
    override: Limit | None = None,
) -> list[tuple[Limit, CountKey]]:
    """The limits that a request is subject to, and the keys of their counts; see Limiter.plan."""
    known = {**facts, TENANT: tenant, PLAN: limits.plan_of(tenant)}
    found = limits.matching(tenant, name, known) if override is None else [override]
    return [
        (limit, (*limit.key, limit.kind, *(known.get(fact, "") for fact in limit.per)))
        for limit in found
        if (limit.algorithm is Algorithm.CONCURRENCY) is slots
        and (not own or limit.names_own_methods)
    ]


def tightest_of(plan: Plan, rooms: Sequence[int]) -> tuple[Charge, int]:
    """The count with the least room, one of a shadow limit only where no other applies."""
    tightest, least = plan[0], rooms[0]
    for charge, room in zip(plan, rooms, strict=True):
        if (charge.shadow, room) < (tightest.shadow, least):
            tightest, least = charge, room
    return tightest, least


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
