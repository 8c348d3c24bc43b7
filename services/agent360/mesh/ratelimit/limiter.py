"""Decides requests in memory and charges them to all limits that apply, or to none."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from agent360.mesh.ratelimit.count_table import CountTable
from agent360.mesh.ratelimit.counts import (
    Charge,
    CountKey,
    Plan,
    longest_of,
    tightest_of,
)
from agent360.mesh.ratelimit.decisions import (
    UNLIMITED_LEASE_S,
    Decision,
    Leased,
    Settlement,
    Usage,
    allowed_run,
    lease_size,
    unlimited,
)
from agent360.mesh.ratelimit.failures import reservation_unknown
from agent360.mesh.ratelimit.free import free_id, free_settlement
from agent360.mesh.ratelimit.limits import Limit, LimitSet
from agent360.mesh.ratelimit.record_ids import Kind, require_kind
from agent360.mesh.ratelimit.slot_holders import SlotHolders

_new_tuple: Final = tuple.__new__
"""A NamedTuple's own constructor takes twice as long."""

_NO_FACTS: Final[Mapping[str, str]] = {}


class _Charged(NamedTuple):
    """Tokens that were charged in advance."""

    tenant: str
    charges: Plan
    marks: tuple[int, ...]
    tokens: int
    decision: Decision
    at: int
    ends: int


class Limiter:
    """Decides and charges, in memory.

    Invariant: deciding and charging happen without a pause in between, so callers that come at the
    same time cannot slip through together.

    Example:
        >>> limiter = Limiter(LimitSet([Limit("r", 2, 60.0)]), wall_clock())
        >>> [limiter.check("acme", "search", 1).allowed for _ in range(3)]
        [True, True, False]
    """

    def __init__(
        self,
        limits: LimitSet,
        clock: Callable[[], int],
        *,
        max_counters: int = 200_000,
        max_reservations: int = 200_000,
        lease_ttl_s: float = 1.0,
        reservations_kept_s: float = 3_600.0,
        new_id: Callable[[], str] = lambda: secrets.token_urlsafe(12),
    ) -> None:
        """Makes a limiter.

        Args:
            limits: that it decides by.
            clock: microseconds since 1970, never stepping.
            max_counters: counts kept at a time; what is whole again makes room.
            max_reservations: reservations and leases remembered at a time.
            lease_ttl_s: longest time to live of a lease, in seconds.
            reservations_kept_s: how long a reservation can be settled after its time to live.
            new_id: names reservations, leases and slots.
        """
        self.clock = clock
        self.counts = CountTable(limits, clock, max_counters)
        """Has the limits and what they count."""
        self._max_records = max_reservations
        self._lease_ttl_us = round(lease_ttl_s * 1e6)
        self._kept_us = round(reservations_kept_s * 1e6)
        self._new_id = new_id
        self._reservations: OrderedDict[str, _Charged] = OrderedDict()
        self._settled: set[str] = set()
        self._by_request: OrderedDict[tuple[str, str, str], str] = OrderedDict()
        self._leases: OrderedDict[str, _Charged] = OrderedDict()
        self._holders = SlotHolders(clock, new_id, self._note_denial)
        self.allowed = 0
        """Requests that were allowed."""
        self.denied: dict[str, int] = {}
        """Requests that were denied, by limit; those of shadow limits too."""

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

    def plan(
        self,
        tenant: str,
        name: str,
        facts: Mapping[str, str],
        *,
        slots: bool = False,
        own: bool = False,
        override: Limit | None = None,
    ) -> Plan:
        """See ``CountTable.plan``."""
        return self.counts.plan(tenant, name, facts, slots=slots, own=own, override=override)

    def decide(self, plan: Plan, hits: int, allow_partial: bool, now: int) -> Decision:
        """Decides on a plan and charges all of its counts, or none."""
        if len(plan) == 1 and hits and plan[0].plain:
            charge = plan[0]
            admitted = charge.counter.admit(now, hits)
            if admitted is not None:
                self.allowed += 1
                remaining, reset_us = admitted
                if now >= charge.ends:
                    charge.turn(now)
                used = charge.size - remaining
                if used > charge.peak:
                    charge.peak = used
                return _new_tuple(
                    Decision,
                    (
                        True,
                        hits,
                        remaining,
                        charge.size,
                        reset_us / 1e6,
                        None,
                        charge.limit_id,
                        False,
                    ),
                )
        elif not plan:
            self.allowed += 1
            return unlimited(hits)
        return self._decide(plan, hits, allow_partial, now)[0]

    def decide_run(
        self, plan: Plan, hits: int, allow_partial: bool, times: int, now: int
    ) -> Sequence[Decision]:
        """Decides the same so many times in a row.

        Where all are allowed, ``reset_after_s`` of each is that after the last.
        """
        if len(plan) == 1 and hits and plan[0].plain:
            charge = plan[0]
            admitted = charge.counter.admit(now, hits * times)
            if admitted is not None:
                self.allowed += times
                remaining, reset_us = admitted
                charge.turn(now)
                charge.peak = max(charge.peak, charge.size - remaining)
                return allowed_run(
                    hits, times, remaining, charge.size, reset_us / 1e6, charge.limit_id
                )
        return [self.decide(plan, hits, allow_partial, now) for _ in range(times)]

    def _decide(
        self, plan: Plan, hits: int, allow_partial: bool, now: int
    ) -> tuple[Decision, tuple[int, ...]]:
        """The same for any plan, with the marks of what was charged."""
        if not plan:
            self.allowed += 1
            return unlimited(hits), ()
        rooms = [charge.counter.room(now) for charge in plan]
        tightest, least = tightest_of(plan, rooms)
        for charge, room in zip(plan, rooms, strict=True):
            if charge.shadow and room < hits:
                self._note_denial(charge)
        enough = tightest.shadow or least >= hits
        granted = hits if enough else (max(0, least) if allow_partial else 0)
        allowed = granted > 0 if hits else tightest.shadow or least > 0
        marks: tuple[int, ...] = ()
        if allowed:
            self.allowed += 1
        if granted:
            marks = tuple([charge.counter.take(now, granted) for charge in plan])
            for charge, room in zip(plan, rooms, strict=True):
                charge.note_charge(now, granted, charge.size - room + granted)
        retry_after_s = None
        if not allowed or granted < hits:
            needed = 1 if allow_partial else max(1, hits)
            waits = [
                (charge.counter.wait(now, needed), charge) for charge in plan if not charge.shadow
            ]
            longest, tightest = longest_of(waits, tightest)
            least = rooms[plan.index(tightest)]
            retry_after_s = None if longest is None else longest / 1e6
            if hits:
                self._note_denial(tightest)
        decision = Decision(
            allowed,
            granted,
            max(0, least - granted),
            tightest.size,
            tightest.counter.reset(now) / 1e6,
            retry_after_s,
            tightest.limit_id,
        )
        return decision, marks

    # ---------------------------------------------------------------- token budgets

    def reserve(
        self,
        tenant: str,
        name: str,
        plan: Plan,
        tokens: int,
        ttl_s: float,
        request_id: str = "",
    ) -> tuple[Decision, str]:
        """Charges an estimate; returns the decision and the reservation's id, empty if denied.

        A second reserve of the same request id and name returns the first one's reservation.
        """
        now = self.clock()
        if request_id:
            known_id = self._by_request.get((tenant, request_id, name), "")
            known = self._reservations.get(known_id)
            if known is not None:
                return known.decision, known_id
        if not plan:
            self.allowed += 1
            return unlimited(tokens), free_id(Kind.RESERVATION, tokens, self._new_id())
        decision, marks = self._decide(plan, tokens, False, now)
        if not decision.allowed:
            return decision, ""
        reservation_id = Kind.RESERVATION.value + self._new_id()
        self._forget(self._reservations, now)
        ends = now + round(ttl_s * 1e6) + self._kept_us
        charged = _Charged(tenant, plan, marks, tokens, decision, now, ends)
        self._reservations[reservation_id] = charged
        if request_id:
            self._by_request[tenant, request_id, name] = reservation_id
            while len(self._by_request) > self._max_records:
                self._by_request.popitem(last=False)
        return decision, reservation_id

    def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """Replaces a reservation by what was used, exactly once.

        Raises:
            MeshError: NOT_FOUND; there is no such reservation of the tenant. FAILED_PRECONDITION;
                the id is of something else.
        """
        free = free_settlement(reservation_id, tokens)
        if free is not None:
            return free
        require_kind(reservation_id, Kind.RESERVATION)
        now = self.clock()
        reservation = self._reservations.get(reservation_id)
        if reservation is None or reservation.tenant != tenant:
            raise reservation_unknown(reservation_id)
        adjustment = 0
        repeated = reservation_id in self._settled
        if not repeated:
            self._settled.add(reservation_id)
            adjustment = tokens - reservation.tokens
            self._adjust(reservation, adjustment, now)
        rooms = [charge.counter.room(now) for charge in reservation.charges if not charge.shadow]
        return Settlement(adjustment, repeated, max(0, min(rooms, default=0)))

    def _adjust(self, charged: _Charged, adjustment: int, now: int) -> None:
        for charge, mark in zip(charged.charges, charged.marks, strict=True):
            if adjustment > 0:
                charge.counter.take(now, adjustment)
            elif adjustment < 0:
                charge.counter.give_back(now, -adjustment, mark, charged.tokens)
            charge.note_adjustment(now, adjustment, charged.at)

    # ---------------------------------------------------------------- leases

    def lease(self, tenant: str, plan: Plan, tokens: int) -> Leased:
        """Charges tokens in advance, as many of those asked for as are good for all."""
        if not plan:
            return Leased(unlimited(tokens), "", UNLIMITED_LEASE_S)
        now = self.clock()
        if any(charge.limit.strict for charge in plan):
            return Leased(self._decide(plan, 0, False, now)[0]._replace(granted=0), "", 0.0, True)
        rooms = [charge.counter.room(now) for charge in plan if not charge.shadow]
        wanted = lease_size(tokens, min(rooms, default=4 * tokens)) or 1
        decision, marks = self._decide(plan, wanted, False, now)
        if not decision.allowed:
            return Leased(decision, "", 0.0)
        times = [self._lease_ttl_us]
        times += [us for charge in plan if (us := charge.counter.lease_us(now)) is not None]
        ttl_us = min(times)
        lease_id = Kind.LEASE.value + self._new_id()
        self._forget(self._leases, now)
        self._leases[lease_id] = _Charged(
            tenant, plan, marks, wanted, decision, now, now + ttl_us + self._lease_ttl_us
        )
        return Leased(decision, lease_id, ttl_us / 1e6)

    def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """Gives unspent tokens back, once; returns how many."""
        require_kind(lease_id, Kind.LEASE)
        now = self.clock()
        lease = self._leases.get(lease_id)
        if lease is None or lease.tenant != tenant:
            return 0
        del self._leases[lease_id]
        if now >= lease.ends:
            return 0
        returned = min(unspent, lease.tokens)
        self._adjust(lease, -returned, now)
        return returned

    # ---------------------------------------------------------------- slots

    def acquire(self, tenant: str, plan: Plan, slots: int, ttl_s: float) -> tuple[Decision, str]:
        """Takes slots of all limits, or of none; returns the decision and the slots' id."""
        decision, slot_id = self._holders.acquire(tenant, plan, slots, ttl_s)
        self.allowed += decision.allowed
        return decision, slot_id

    def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """Keeps slots for longer; returns their time to live, None if they had come back."""
        return self._holders.renew(tenant, slot_id, ttl_s)

    def release(self, tenant: str, slot_id: str) -> bool:
        """Gives slots back; False if they had come back."""
        return self._holders.release(tenant, slot_id)

    # ---------------------------------------------------------------- usage

    def usage(
        self, tenant: str, key: CountKey | None = None, *, together: bool = False
    ) -> Iterator[Usage]:
        """How much is used of each count of a tenant, or of only one; see ``CountTable.usage``."""
        return self.counts.usage(tenant, key, together)

    # ---------------------------------------------------------------- within

    def _note_denial(self, charge: Charge) -> None:
        charge.note_denial()
        limit_id = charge.limit_id
        self.denied[limit_id] = self.denied.get(limit_id, 0) + 1

    def _forget(self, records: OrderedDict[str, _Charged], now: int) -> None:
        """Forgets what is long over, or beyond the bound."""
        while records:
            oldest = next(iter(records))
            if records[oldest].ends > now and len(records) < self._max_records:
                break
            del records[oldest]
            self._settled.discard(oldest)
