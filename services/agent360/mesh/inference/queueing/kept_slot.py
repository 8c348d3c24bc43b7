"""The last free slot of a model is left to tenants that have none and came lately."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from agent360.mesh.inference.queueing.line import Line
from agent360.mesh.inference.queueing.waiters import Waiter

_LOOKED_AT: Final = 64
"""Tenants among whom one with a claim is sought, the latest first."""


class _Visit(NamedTuple):
    """When and how a tenant came last."""

    at: float
    level: int
    weight: float


class KeptSlot:
    """Who has a claim to the last free slot.

    What runs is not interrupted: were all slots one tenant's, another would wait for the rest of an
    answer that may be many times its own. So a tenant that has a slot leaves the last one to those
    that have none, came within ``keep_slot_s`` and would not wait for others if they came now. One
    slot all the time is no more than its due for whose share of all slots is at least one; a
    smaller tenant has a claim while it got less than its share.

    Nobody starves: whoever is kept waiting has a slot, whose end is its next chance.

    Example:
        >>> kept = KeptSlot(weight_of)
        >>> kept.came(waiter, now)
        >>> kept.is_kept_from(waiter, line, slots=8, held=gate.held_by, now=now)
        False
    """

    __slots__ = ("_visits", "_weight", "_weight_of")

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._visits: dict[str, _Visit] = {}
        self._weight = 0.0

    @property
    def shared(self) -> bool:
        """Whether more than one tenant came lately, as far as is known without looking."""
        return len(self._visits) > 1

    def came(self, waiter: Waiter[Any], now: float, keep_s: float) -> None:
        """Notes that a tenant asks; those that have not for ``keep_s`` seconds are forgotten."""
        tenant, visits = waiter.ticket.tenant, self._visits
        before = visits.pop(tenant, None)
        weight = self._weight_of(tenant)
        visits[tenant] = _Visit(now, waiter.level, weight)
        self._weight += weight - (before.weight if before is not None else 0.0)
        self._forget(now - keep_s)

    def is_kept_from(
        self,
        waiter: Waiter[Any],
        line: Line[Any],
        slots: int,
        held: Callable[[str], int],
        now: float,
    ) -> bool:
        """Whether a request has to leave the last free slot to another tenant.

        Args:
            waiter: the request.
            line: who waits.
            slots: all of the model, free or not.
            held: slots that a tenant has.
            now: monotonic seconds.
        """
        tenant = waiter.ticket.tenant
        self._forget(now - line.settings.keep_slot_s)
        if not self.shared or slots < 2 or not held(tenant):
            return False
        return any(
            not held(other) and self._has_claim(other, visit, waiter, line, slots)
            for other, visit in self._latest()
            if other != tenant and not line.holds(other)
        )

    def is_kept_for(
        self, waiter: Waiter[Any], line: Line[Any], slots: int, held: Callable[[str], int]
    ) -> bool:
        """Whether a request that just came has a claim, whoever waits."""
        tenant = waiter.ticket.tenant
        visit = self._visits.get(tenant)
        first = line.first(waiter.arrived)
        if visit is None or first is None or held(tenant) or line.holds(tenant):
            return False
        return bool(held(first.ticket.tenant)) and self._has_claim(
            tenant, visit, first, line, slots
        )

    def _has_claim(
        self, tenant: str, visit: _Visit, against: Waiter[Any], line: Line[Any], slots: int
    ) -> bool:
        if visit.level != against.level:
            return visit.level < against.level
        if slots * visit.weight >= self._weight:
            return True
        return line.got_less(tenant, against)

    def _latest(self) -> Iterator[tuple[str, _Visit]]:
        return islice(reversed(self._visits.items()), _LOOKED_AT)

    def _forget(self, before: float) -> None:
        visits = self._visits
        while visits:
            tenant = next(iter(visits))
            if visits[tenant].at > before:
                return
            self._weight -= visits.pop(tenant).weight
