"""Decides requests in memory and charges them to all limits that apply, or to none."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

from agent360.mesh.ratelimit.counts import (
    Charge,
    CountKey,
    Plan,
    counts_of,
    longest_of,
    tightest_of,
)
from agent360.mesh.ratelimit.decisions import (
    UNLIMITED_LEASE_S,
    Decision,
    Leased,
    Settlement,
    Usage,
    lease_size,
    unlimited,
)
from agent360.mesh.ratelimit.failures import counts_exhausted, reservation_unknown
from agent360.mesh.ratelimit.free import free_id, free_quantity, free_renewal, free_settlement
from agent360.mesh.ratelimit.limits import TENANT, Algorithm, FailureMode, Limit, LimitSet

_new_tuple: Final = tuple.__new__
"""A NamedTuple's own constructor takes twice as long."""

_LOOKED_AT: Final = 64
"""Counts that are looked at to make room for one."""

_NO_FACTS: Final[Mapping[str, str]] = {}


class _Charged(NamedTuple):
    """Tokens that were charged in advance."""

    tenant: str
    charges: Plan
    marks: tuple[int, ...]
    tokens: int
    decision: Decision
    ends: int


class _Slots(NamedTuple):
    charges: Plan
    tenant: str
    ttl_us: int


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
        self.limits = limits
        self._max_counters = max_counters
        self._max_records = max_reservations
        self._lease_ttl_us = round(lease_ttl_s * 1e6)
        self._kept_us = round(reservations_kept_s * 1e6)
        self._new_id = new_id
        self._counts: OrderedDict[CountKey, Charge] = OrderedDict()
        self._reservations: OrderedDict[str, _Charged] = OrderedDict()
        self._settled: set[str] = set()
        self._by_request: OrderedDict[tuple[str, str, str], str] = OrderedDict()
        self._leases: OrderedDict[str, _Charged] = OrderedDict()
        self._slots: OrderedDict[str, _Slots] = OrderedDict()
        self.allowed = 0
        """Requests that were allowed."""
        self.denied: dict[str, int] = {}
        """Requests that were denied, by limit; those of shadow limits too."""
        self.generation = 0
        """Grows when counts were dropped or limits changed: plans must be made again."""

    def replace_limits(self, limits: LimitSet) -> None:
        """Decides by other limits from now on; counts of limits that still count so stay."""
        self.limits = limits
        for key in list(self._counts):
            limit = limits.find(*key[:3])
            if limit is None or limit.kind != key[3]:
                del self._counts[key]
            else:
                self._counts[key].adopt(limit)
        self.generation += 1

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
    ) -> Plan:
        """The counts that a request is charged to.

        Args:
            tenant: whose request it is.
            name: of what is done.
            facts: about it.
            slots: the concurrency limits, in place of the others.
            own: only limits that name RPCs of the mesh.

        Raises:
            MeshError: RESOURCE_EXHAUSTED; there is no room for the count of a closed limit.
        """
        charges: list[Charge] = []
        for limit, key in counts_of(self.limits, tenant, name, facts, slots=slots, own=own):
            charge = self._counts.get(key)
            if charge is None:
                charge = self._new_count(limit, key, charges)
            else:
                self._counts.move_to_end(key)
            charges.append(charge)
        return tuple(charges)

    def decide(self, plan: Plan, hits: int, allow_partial: bool, now: int) -> Decision:
        """Decides on a plan and charges all of its counts, or none."""
        if len(plan) == 1 and hits and not plan[0].shadow:
            charge = plan[0]
            admitted = charge.counter.admit(now, hits)
            if admitted is not None:
                self.allowed += 1
                remaining, reset_us = admitted
                if remaining < charge.least:
                    charge.least = remaining
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

    def _decide(
        self, plan: Plan, hits: int, allow_partial: bool, now: int
    ) -> tuple[Decision, tuple[int, ...]]:
        """The same for any plan, with the marks of what was charged."""
        if not plan:
            self.allowed += 1
            return unlimited(hits), ()
        rooms = [charge.counter.room(now) for charge in plan]
        tightest, least = tightest_of(plan, rooms, hits)
        for charge, room in zip(plan, rooms, strict=True):
            if charge.shadow and room < hits:
                self._note_denial(charge)
        granted = hits if least >= hits else (max(0, least) if allow_partial else 0)
        allowed = granted > 0 if hits else least > 0
        marks: tuple[int, ...] = ()
        if allowed:
            self.allowed += 1
        if granted:
            marks = tuple([charge.counter.take(now, granted) for charge in plan])
            for charge, room in zip(plan, rooms, strict=True):
                charge.least = min(charge.least, room - granted)
        retry_after_s = None
        if not allowed or granted < hits:
            needed = 1 if allow_partial else max(1, hits)
            waits = [
                (charge.counter.wait(now, needed), charge) for charge in plan if not charge.shadow
            ]
            longest, tightest = longest_of(waits, tightest)
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
            return unlimited(tokens), free_id(tokens, self._new_id())
        decision, marks = self._decide(plan, tokens, False, now)
        if not decision.allowed:
            return decision, ""
        reservation_id = self._new_id()
        self._forget(self._reservations, now)
        ends = now + round(ttl_s * 1e6) + self._kept_us
        self._reservations[reservation_id] = _Charged(tenant, plan, marks, tokens, decision, ends)
        if request_id:
            self._by_request[tenant, request_id, name] = reservation_id
            while len(self._by_request) > self._max_records:
                self._by_request.popitem(last=False)
        return decision, reservation_id

    def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """Replaces a reservation by what was used, exactly once.

        Raises:
            MeshError: NOT_FOUND; there is no such reservation of the tenant.
        """
        free = free_settlement(reservation_id, tokens)
        if free is not None:
            return free
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
        lease_id = self._new_id()
        self._forget(self._leases, now)
        self._leases[lease_id] = _Charged(
            tenant, plan, marks, wanted, decision, now + ttl_us + self._lease_ttl_us
        )
        return Leased(decision, lease_id, ttl_us / 1e6)

    def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """Gives unspent tokens back, once; returns how many."""
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
        now = self.clock()
        slot_id = self._new_id()
        if not plan:
            self.allowed += 1
            return unlimited(slots), free_id(round(ttl_s * 1e6), slot_id)
        rooms = [charge.pool.room(now) for charge in plan]
        tightest, least = tightest_of(plan, rooms, slots)
        for charge, room in zip(plan, rooms, strict=True):
            if charge.shadow and room < slots:
                self._note_denial(charge)
        if least < slots:
            waits = [(charge.pool.wait(now, slots), charge) for charge in plan if not charge.shadow]
            longest, tightest = longest_of(waits, tightest)
            self._note_denial(tightest)
            retry_after_s = None if longest is None else longest / 1e6
            return self._slots_decision(tightest, 0, least, retry_after_s, now), ""
        self.allowed += 1
        ttl_us = round(ttl_s * 1e6)
        for charge, room in zip(plan, rooms, strict=True):
            charge.pool.hold(now, slot_id, slots, ttl_us)
            charge.least = min(charge.least, room - slots)
        self._slots[slot_id] = _Slots(plan, tenant, ttl_us)
        self._forget_slots(now)
        return self._slots_decision(tightest, slots, least - slots, None, now), slot_id

    def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """Keeps slots for longer; returns their time to live, None if they had come back."""
        free_s = free_renewal(slot_id, ttl_s)
        if free_s is not None:
            return free_s
        held = self._slots.get(slot_id)
        if held is None or held.tenant != tenant:
            return None
        now = self.clock()
        ttl_us = held.ttl_us if ttl_s is None else round(ttl_s * 1e6)
        renewed = [charge.pool.renew(now, slot_id, ttl_us) for charge in held.charges]
        if not all(renewed):
            return None
        self._slots.move_to_end(slot_id)
        return ttl_us / 1e6

    def release(self, tenant: str, slot_id: str) -> bool:
        """Gives slots back; False if they had come back."""
        if free_quantity(slot_id) is not None:
            return True
        held = self._slots.get(slot_id)
        if held is None or held.tenant != tenant:
            return False
        del self._slots[slot_id]
        now = self.clock()
        for charge in held.charges:
            charge.pool.room(now)
        released = [charge.pool.release(slot_id) for charge in held.charges]
        return all(released)

    def _slots_decision(
        self, tightest: Charge, granted: int, least: int, retry_after_s: float | None, now: int
    ) -> Decision:
        return Decision(
            granted > 0,
            granted,
            max(0, least),
            tightest.size,
            tightest.pool.reset(now) / 1e6,
            retry_after_s,
            tightest.limit_id,
        )

    def _forget_slots(self, now: int) -> None:
        """Drops a few of the oldest records whose slots came back by themselves."""
        for _ in range(2):
            slot_id, held = next(iter(self._slots.items()))
            if all(charge.pool.holds(now, slot_id) for charge in held.charges):
                self._slots.move_to_end(slot_id)
            else:
                del self._slots[slot_id]
            if not self._slots:
                return

    # ---------------------------------------------------------------- usage

    def usage(self, tenant: str, key: CountKey | None = None) -> Iterator[Usage]:
        """How much is used of each count that is the tenant's, in no order; or only of one."""
        now = self.clock()
        for counted in list(self._counts) if key is None else [key]:
            charge = self._counts.get(counted)
            if charge is None:
                continue
            limit = charge.limit
            by = tuple(zip(limit.per, counted[4:], strict=True))
            if limit.tenant != tenant and (TENANT, tenant) not in by:
                continue
            slots = limit.algorithm is Algorithm.CONCURRENCY
            room = charge.pool.room(now) if slots else charge.counter.room(now)
            reset_us = charge.pool.reset(now) if slots else charge.counter.reset(now)
            yield Usage(
                limit.limit_id,
                tuple(each for each in by if each[0] != TENANT),
                limit.size - room,
                max(0, room),
                limit.size,
                charge.denied,
                max(limit.size - charge.least, limit.size - room),
                reset_us / 1e6,
            )

    # ---------------------------------------------------------------- within

    def _note_denial(self, charge: Charge) -> None:
        charge.denied += 1
        limit_id = charge.limit_id
        self.denied[limit_id] = self.denied.get(limit_id, 0) + 1

    def _new_count(self, limit: Limit, key: CountKey, planned: Sequence[Charge]) -> Charge:
        """A count that is kept or, where there is no room and the limit is open, is not."""
        charge = Charge(limit)
        if len(self._counts) < self._max_counters or self._make_room(planned):
            self._counts[key] = charge
        elif limit.failure_mode is FailureMode.CLOSED and not limit.shadow:
            raise counts_exhausted(limit.limit_id)
        return charge

    def _make_room(self, planned: Sequence[Charge]) -> bool:
        """Drops those that are whole again of the longest unused counts; whether there were any.

        A count with charges or holders stays, and is looked at again after all the others.
        """
        now, dropped = self.clock(), False
        for key in list(islice(self._counts, _LOOKED_AT)):
            charge = self._counts[key]
            slots = charge.limit.algorithm is Algorithm.CONCURRENCY
            reset_us = charge.pool.reset(now) if slots else charge.counter.reset(now)
            if reset_us > 0 or charge in planned:
                self._counts.move_to_end(key)
            else:
                del self._counts[key]
                dropped = True
        if dropped:
            self.generation += 1
        return dropped

    def _forget(self, records: OrderedDict[str, _Charged], now: int) -> None:
        """Forgets what is long over, or beyond the bound."""
        while records:
            oldest = next(iter(records))
            if records[oldest].ends > now and len(records) < self._max_records:
                break
            del records[oldest]
            self._settled.discard(oldest)
