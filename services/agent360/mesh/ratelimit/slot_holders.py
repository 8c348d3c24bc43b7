"""Who holds concurrency slots, in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from agent360.mesh.ratelimit.counts import Charge, Plan, longest_of, tightest_of
from agent360.mesh.ratelimit.decisions import Decision, unlimited
from agent360.mesh.ratelimit.free import free_id, free_quantity, free_renewal
from agent360.mesh.ratelimit.record_ids import Kind, require_kind


class _Slots(NamedTuple):
    charges: Plan
    tenant: str
    ttl_us: int


class SlotHolders:
    """Takes slots of all limits of a request or of none, and gives them back."""

    def __init__(
        self,
        clock: Callable[[], int],
        new_id: Callable[[], str],
        note_denial: Callable[[Charge], None],
    ) -> None:
        """Makes one without holders.

        Args:
            clock: microseconds since 1970, never stepping.
            new_id: names slots.
            note_denial: told which count denied or, in shadow mode, would have.
        """
        self._clock = clock
        self._new_id = new_id
        self._note_denial = note_denial
        self._slots: OrderedDict[str, _Slots] = OrderedDict()

    def acquire(self, tenant: str, plan: Plan, slots: int, ttl_s: float) -> tuple[Decision, str]:
        """Takes slots of all limits, or of none; returns the decision and the slots' id."""
        now = self._clock()
        slot_id = Kind.SLOTS.value + self._new_id()
        if not plan:
            return unlimited(slots), free_id(Kind.SLOTS, round(ttl_s * 1e6), self._new_id())
        rooms = [charge.pool.room(now) for charge in plan]
        tightest, least = tightest_of(plan, rooms)
        for charge, room in zip(plan, rooms, strict=True):
            if charge.shadow and room < slots:
                self._note_denial(charge)
        if least < slots and not tightest.shadow:
            waits = [(charge.pool.wait(now, slots), charge) for charge in plan if not charge.shadow]
            longest, tightest = longest_of(waits, tightest)
            least = rooms[plan.index(tightest)]
            self._note_denial(tightest)
            retry_after_s = None if longest is None else longest / 1e6
            return self._slots_decision(tightest, 0, least, retry_after_s, now), ""
        ttl_us = round(ttl_s * 1e6)
        for charge, room in zip(plan, rooms, strict=True):
            charge.hold(now, slot_id, slots, ttl_us)
            charge.note_charge(now, 0, charge.size - room + slots)
        self._slots[slot_id] = _Slots(plan, tenant, ttl_us)
        self._forget_slots(now)
        return self._slots_decision(tightest, slots, least - slots, None, now), slot_id

    def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """Keeps slots for longer; returns their time to live, None if they had come back."""
        free_s = free_renewal(slot_id, ttl_s)
        if free_s is not None:
            return free_s
        require_kind(slot_id, Kind.SLOTS)
        held = self._slots.get(slot_id)
        if held is None or held.tenant != tenant:
            return None
        now = self._clock()
        ttl_us = held.ttl_us if ttl_s is None else round(ttl_s * 1e6)
        renewed = [charge.renew(now, slot_id, ttl_us) for charge in held.charges]
        if not all(renewed):
            return None
        self._slots.move_to_end(slot_id)
        return ttl_us / 1e6

    def release(self, tenant: str, slot_id: str) -> bool:
        """Gives slots back; False if they had come back."""
        if free_quantity(Kind.SLOTS, slot_id) is not None:
            return True
        require_kind(slot_id, Kind.SLOTS)
        held = self._slots.get(slot_id)
        if held is None or held.tenant != tenant:
            return False
        del self._slots[slot_id]
        now = self._clock()
        released = [charge.release(now, slot_id) for charge in held.charges]
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
