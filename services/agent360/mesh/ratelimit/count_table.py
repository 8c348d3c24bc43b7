"""The counts that are kept in memory: found for requests, told of, and dropped when whole."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from typing import Final

from agent360.mesh.ratelimit.counts import Charge, CountKey, Plan, counts_of
from agent360.mesh.ratelimit.decisions import Usage
from agent360.mesh.ratelimit.failures import counts_exhausted
from agent360.mesh.ratelimit.limits import TENANT, Algorithm, FailureMode, Limit, LimitSet, Source

_LOOKED_AT: Final = 64
"""Counts that are looked at to make room for one."""


class CountTable:
    """All counts of the limits in force, the least recently used first.

    Example:
        >>> table = CountTable(LimitSet([Limit("r", 2, 60.0)]), wall_clock(), 1_000)
        >>> (charge,) = table.plan("acme", "search", {})
    """

    def __init__(self, limits: LimitSet, clock: Callable[[], int], max_counters: int) -> None:
        """Makes a table without counts.

        Args:
            limits: in force.
            clock: microseconds since 1970, never stepping.
            max_counters: counts kept at a time; what is whole again makes room.
        """
        self.limits = limits
        self.generation = 0
        """Grows when counts were dropped or limits changed: plans must be made again."""
        self._clock = clock
        self._max_counters = max_counters
        self._counts: OrderedDict[CountKey, Charge] = OrderedDict()

    def replace_limits(self, limits: LimitSet) -> None:
        """Counts for other limits from now on; counts of limits that still count so stay."""
        self.limits = limits
        for key in list(self._counts):
            if self._counts[key].limit.source is Source.REQUEST:
                continue
            limit = limits.find(*key[:3])
            if limit is None or limit.kind != key[3]:
                del self._counts[key]
            else:
                self._counts[key].adopt(limit)
        self.generation += 1

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
        """The counts that a request is charged to.

        Args:
            tenant: whose request it is.
            name: of what is done.
            facts: about it.
            slots: the concurrency limits, in place of the others.
            own: only limits that name RPCs of the mesh.
            override: a limit that the request brings, in place of all others.

        Raises:
            MeshError: RESOURCE_EXHAUSTED; there is no room for the count of a closed limit.
        """
        charges: list[Charge] = []
        found = counts_of(self.limits, tenant, name, facts, slots=slots, own=own, override=override)
        planned = {key for _, key in found}
        for limit, key in found:
            charge = self._counts.get(key)
            if charge is None:
                charge = self._new_count(limit, key, planned)
            else:
                self._counts.move_to_end(key)
                if charge.limit.amount != limit.amount:  # another request brought more or less
                    charge.adopt(limit)
            charges.append(charge if limit.tenants_apart else charge.share_of(tenant))
        return tuple(charges)

    def usage(
        self,
        tenant: str,
        key: CountKey | None,
        together: bool,
    ) -> Iterator[Usage]:
        """How much is used of each count, in no order, or only of one.

        Args:
            tenant: whose counts, and whose shares of those that count several tenants.
            key: only of this count.
            together: in place of them, the counts of several tenants, as of all of them.
        """
        now = self._clock()
        for counted in list(self._counts) if key is None else [key]:
            charge = self._counts.get(counted)
            if charge is None or (together and charge.limit.tenants_apart):
                continue
            limit = charge.limit
            if limit.source is Source.REQUEST:
                continue
            by = tuple(zip(limit.per, counted[4:], strict=True))
            slots = limit.algorithm is Algorithm.CONCURRENCY
            room = charge.pool.room(now) if slots else charge.counter.room(now)
            reset_us = charge.pool.reset(now) if slots else charge.counter.reset(now)
            used = charge.size - room
            if not limit.tenants_apart and not together:
                share = charge.shares.get(tenant)
                if share is None or self.limits.of(tenant).get(limit.limit_id) != limit:
                    continue
                share.turn(now)
                used, charge = share.held(now) if slots else share.charged, share
            elif not together and limit.tenant != tenant and (TENANT, tenant) not in by:
                continue
            charge.turn(now)
            yield Usage(
                limit.limit_id,
                tuple(each for each in by if each[0] != TENANT),
                used,
                max(0, room),
                charge.size,
                charge.denied,
                max(charge.peak, used),
                reset_us / 1e6,
            )

    def _new_count(self, limit: Limit, key: CountKey, planned: Collection[CountKey]) -> Charge:
        """A count that is kept or, where there is no room and the limit is open, is not."""
        charge = Charge(limit)
        if len(self._counts) < self._max_counters or self._make_room(planned):
            self._counts[key] = charge
        elif limit.failure_mode is FailureMode.CLOSED and not limit.shadow:
            raise counts_exhausted(limit.limit_id)
        return charge

    def _make_room(self, planned: Collection[CountKey]) -> bool:
        """Drops those that are whole again of the longest unused counts; whether there were any.

        A count with charges or holders stays, and is looked at again after all the others.
        """
        now, dropped = self._clock(), False
        for key in list(islice(self._counts, _LOOKED_AT)):
            charge = self._counts[key]
            slots = charge.limit.algorithm is Algorithm.CONCURRENCY
            reset_us = charge.pool.reset(now) if slots else charge.counter.reset(now)
            if reset_us > 0 or key in planned:
                self._counts.move_to_end(key)
            else:
                del self._counts[key]
                dropped = True
        if dropped:
            self.generation += 1
        return dropped
