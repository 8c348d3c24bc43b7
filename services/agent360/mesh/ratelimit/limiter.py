"""The ratelimit service's domain: decides requests and charges them to all limits or to none."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import grpc

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.counters import Counter
from agent360.mesh.ratelimit.limits import Limit, LimitSet

_new_tuple: Final = tuple.__new__
"""A NamedTuple's own constructor takes twice as long."""

_NO_FACTS: Final[Mapping[str, str]] = {}


class Decision(NamedTuple):
    """The decision on a request."""

    allowed: bool
    granted: int
    remaining: int
    limit: int
    reset_after_s: float
    retry_after_s: float | None
    limit_id: str


class Charge:
    """One count that a request is charged to."""

    __slots__ = ("counter", "limit", "limit_id", "shadow", "size")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.counter: Counter = limit.counter()
        self.limit_id = limit.limit_id
        self.size = limit.size
        self.shadow = limit.shadow


@dataclass(slots=True)
class Reservation:
    """Tokens that were charged in advance."""

    tenant: str
    charges: tuple[Charge, ...]
    tokens: int
    decision: Decision
    expires: float
    settled: bool = False


class Settlement(NamedTuple):
    """What a settle did."""

    adjustment: int
    repeated: bool
    remaining: int


Plan = tuple[Charge, ...]
"""The counts that a request is charged to."""

UNLIMITED: Final = Decision(True, 1, 0, 0, 0.0, None, "")


class Limiter:
    """Decides and charges, in memory.

    Invariant: deciding and charging happen without a pause in between, so callers that come at the
    same time cannot slip through together.

    Example:
        >>> limiter = Limiter(LimitSet([Limit("r", 2, 60.0)]), time.monotonic)
        >>> [limiter.check("acme", "search", 1).allowed for _ in range(3)]
        [True, True, False]
    """

    def __init__(
        self,
        limits: LimitSet,
        clock: Callable[[], float],
        *,
        max_counters: int = 200_000,
        max_reservations: int = 200_000,
        new_id: Callable[[], str] = lambda: secrets.token_urlsafe(12),
    ) -> None:
        self.clock = clock
        self._limits = limits
        self._max_counters = max_counters
        self._max_reservations = max_reservations
        self._new_id = new_id
        self._counters: OrderedDict[tuple[str, ...], Charge] = OrderedDict()
        self._reservations: OrderedDict[str, Reservation] = OrderedDict()
        self._by_request: dict[tuple[str, str], str] = {}
        self.allowed = 0
        """Requests that were allowed."""
        self.denied: dict[str, int] = {}
        """Requests that were denied, by limit; those of shadow limits too."""
        self.generation = 0
        """Grows when counts were dropped: plans made before must be made again."""

    def limits_of(self, tenant: str) -> dict[str, Limit]:
        """The limits a tenant is subject to, by id."""
        return self._limits.of(tenant)

    def check(
        self,
        tenant: str,
        name: str,
        hits: int = 1,
        allow_partial: bool = False,
        facts: Mapping[str, str] = _NO_FACTS,
    ) -> Decision:
        """Decides one request and charges it."""
        return self.decide(self.plan(tenant, name, facts), hits, allow_partial, self.clock())

    def plan(self, tenant: str, name: str, facts: Mapping[str, str]) -> Plan:
        """The counts that a request is charged to."""
        known = {**facts, "tenant": tenant}
        charges = []
        for limit in self._limits.of(tenant).values():
            if not limit.applies(name, known):
                continue
            key = (limit.limit_id, limit.tenant, *(known.get(fact, "") for fact in limit.per))
            charge = self._counters.get(key)
            if charge is None:
                if len(self._counters) >= self._max_counters:
                    self._make_room()
                charge = self._counters[key] = Charge(limit)
            else:
                self._counters.move_to_end(key)
            charges.append(charge)
        return tuple(charges)

    def decide(self, plan: Plan, hits: int, allow_partial: bool, now: float) -> Decision:
        """Decides on a plan and charges all of its counts, or none."""
        if not plan:
            self.allowed += 1
            return UNLIMITED if hits == 1 else UNLIMITED._replace(granted=hits)
        tightest, least = plan[0], -1
        if len(plan) == 1 and hits and not tightest.shadow:
            admitted = tightest.counter.admit(now, hits)
            if admitted is not None:
                self.allowed += 1
                remaining, reset_after_s = admitted
                return _new_tuple(
                    Decision,
                    (
                        True,
                        hits,
                        remaining,
                        tightest.size,
                        reset_after_s,
                        None,
                        tightest.limit_id,
                    ),
                )
        for charge in plan:
            room = charge.counter.room(now)
            if charge.shadow:
                if room < hits:
                    self._count_denial(charge.limit)
                continue
            if least < 0 or room < least:
                tightest, least = charge, max(0, room)
        if least < 0:  # shadow limits alone
            least = hits
        granted = hits if least >= hits else (least if allow_partial else 0)
        allowed = granted > 0 if hits else least > 0
        retry_after_s = None
        if allowed:
            self.allowed += 1
            for charge in plan:
                charge.counter.take(now, granted)
        if not allowed or granted < hits:
            self._count_denial(tightest.limit)
            retry_after_s = _longest_wait(plan, 1 if allow_partial else max(1, hits), now)
        return Decision(
            allowed,
            granted,
            max(0, least - granted),
            tightest.size,
            tightest.counter.reset(now),
            retry_after_s,
            tightest.limit_id,
        )

    # ---------------------------------------------------------------- token budgets

    def reserve(
        self, tenant: str, plan: Plan, tokens: int, ttl_s: float, request_id: str = ""
    ) -> tuple[Decision, str]:
        """Charges an estimate; returns the decision and the reservation's id, empty if denied.

        A second reserve of the same request id returns the first one's reservation.
        """
        now = self.clock()
        if request_id:
            reservation_id = self._by_request.get((tenant, request_id), "")
            known = self._reservations.get(reservation_id)
            if known is not None:
                return known.decision, reservation_id
        decision = self.decide(plan, tokens, False, now)
        if not decision.allowed:
            return decision, ""
        reservation_id = self._new_id()
        self._forget_expired(now)
        self._reservations[reservation_id] = Reservation(
            tenant, plan, tokens, decision, now + ttl_s
        )
        if request_id:
            self._by_request[tenant, request_id] = reservation_id
        return decision, reservation_id

    def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """Replaces a reservation by what was used, exactly once.

        Raises:
            MeshError: NOT_FOUND; there is no such reservation of the tenant.
        """
        now = self.clock()
        reservation = self._reservations.get(reservation_id)
        if reservation is None or reservation.tenant != tenant:
            raise MeshError(
                grpc.StatusCode.NOT_FOUND,
                "RESERVATION_UNKNOWN",
                "there is no such reservation; it may have been forgotten after it expired",
                metadata={"reservation_id": reservation_id[:64]},
            )
        adjustment = 0
        repeated = reservation.settled
        if not repeated:
            reservation.settled = True
            adjustment = tokens - reservation.tokens
            for charge in reservation.charges:
                if adjustment > 0:
                    charge.counter.take(now, adjustment)
                elif adjustment < 0:
                    charge.counter.give_back(now, -adjustment)
        rooms = [charge.counter.room(now) for charge in reservation.charges]
        return Settlement(adjustment, repeated, max(0, min(rooms, default=0)))

    # ---------------------------------------------------------------- within

    def _count_denial(self, limit: Limit) -> None:
        self.denied[limit.limit_id] = self.denied.get(limit.limit_id, 0) + 1

    def _make_room(self) -> None:
        """Drops counts that are whole again or, if there are none, the longest unused tenth."""
        now = self.clock()
        whole = [key for key, charge in self._counters.items() if charge.counter.reset(now) <= 0]
        for key in whole or list(self._counters)[: self._max_counters // 10 + 1]:
            del self._counters[key]
        self.generation += 1

    def _forget_expired(self, now: float) -> None:
        """Forgets reservations twice as old as their time to live, or beyond the bound."""
        while self._reservations:
            reservation_id, oldest = next(iter(self._reservations.items()))
            if oldest.expires > now and len(self._reservations) < self._max_reservations:
                break
            del self._reservations[reservation_id]
        if len(self._by_request) > 2 * self._max_reservations:
            self._by_request = {
                key: value for key, value in self._by_request.items() if value in self._reservations
            }


def _longest_wait(plan: Plan, hits: int, now: float) -> float | None:
    longest = 0.0
    for charge in plan:
        if charge.shadow:
            continue
        wait = charge.counter.wait(now, hits)
        if wait is None:
            return None
        longest = max(longest, wait)
    return longest
