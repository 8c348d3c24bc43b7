"""The domain on a store that replicas share, and what it answers while that is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.decisions import (
    UNLIMITED_LEASE_S,
    Decision,
    Leased,
    Settlement,
    Usage,
    unlimited,
)
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.failures import store_away
from agent360.mesh.ratelimit.free import free_quantity, free_renewal, free_settlement
from agent360.mesh.ratelimit.gathering import Gatherer
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import TENANT, FailureMode, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, Run, SharedStore

_LOCAL: Final = "local-"
_AWAY_RETRY_S: Final = 1.0


class SharedPlan(NamedTuple):
    """The shared counts of a request, and what it takes to find those of this replica."""

    counts: tuple[Any, ...]
    tenant: str
    name: str
    facts: Mapping[str, str]
    slots: bool
    own: bool


class SharedDomain:
    """Decides with a shared store.

    While the store is away, a limit whose failure mode is closed denies; the others are counted by
    this replica alone, so that each replica admits no more than the limit. Such answers are marked
    degraded. Reservations and slots made meanwhile are this replica's.
    """

    def __init__(self, store: SharedStore, local: Limiter) -> None:
        """Makes a domain.

        Args:
            store: has the counts.
            local: stands in for it; knows the limits.
        """
        self._store = store
        self._local = local
        self._generation = 0
        self._gatherer = Gatherer(self._decide)
        self._peaks: dict[tuple[str, ...], int] = {}

    @property
    def generation(self) -> int:
        """See ``Domain``."""
        return self._generation

    @property
    def limits(self) -> LimitSet:
        """See ``Domain``."""
        return self._local.limits

    def replace_limits(self, limits: LimitSet) -> None:
        """See ``Domain``."""
        self._local.replace_limits(limits)
        self._generation += 1

    def plan(
        self,
        tenant: str,
        name: str,
        facts: Mapping[str, str],
        *,
        slots: bool = False,
        own: bool = False,
    ) -> SharedPlan:
        """See ``Domain``."""
        counts = self._store.counts(self.limits, tenant, name, facts, slots=slots, own=own)
        return SharedPlan(counts, tenant, name, facts, slots, own)

    def join(self, plans: Sequence[SharedPlan]) -> SharedPlan:
        """See ``Domain``; while the store is away, the first decides."""
        counts = {count.key: count for plan in plans for count in plan.counts}
        return plans[0]._replace(counts=tuple(counts.values()))

    async def decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        """See ``Domain``."""
        return await self._gatherer.decide(asks)

    async def _decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        runs = self._runs(asks)
        limited = [
            Run(ask._replace(plan=ask.plan.counts), times) for ask, times in runs if ask.plan.counts
        ]
        answers = iter(await self._store.decide(limited) if limited else ())
        decisions: list[Decision] = []
        for ask, times in runs:
            if not ask.plan.counts:
                self._local.allowed += times
                decisions += [unlimited(ask.hits)] * times
                continue
            answer = next(answers)
            if answer is AWAY:
                decisions += [self._alone(ask) for _ in range(times)]
                continue
            decided, denied = answer
            self._count(decided, denied)
            decisions += decided
        return decisions

    def _runs(self, asks: Sequence[Ask]) -> list[Run]:
        """Requests that follow each other and are the same are decided as one."""
        runs: list[Run] = []
        last, times, mergeable = None, 0, False
        for ask in asks:
            if ask is last and mergeable:
                times += 1
                continue
            if last is not None:
                runs.append(Run(last, times))
            last, times = ask, 1
            counts = ask.plan.counts
            mergeable = (
                ask.hits > 0
                and not ask.allow_partial
                and not any(count.limit.shadow for count in counts)
                and (not counts or self._store.in_one_place(counts))
            )
        if last is not None:
            runs.append(Run(last, times))
        return runs

    async def reserve(
        self, tenant: str, name: str, plan: SharedPlan, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        if not plan.counts:
            return self._local.reserve(tenant, name, (), tokens, ttl_s, request_id)
        answer = await self._store.reserve(tenant, name, plan.counts, tokens, ttl_s, request_id)
        if answer is AWAY:
            refusal = _closed(plan)
            if refusal is not None:
                return refusal, ""
            decision, record_id = self._reserve_alone(plan, tokens, ttl_s, request_id)
            return decision._replace(degraded=True), record_id
        decision, record_id = answer
        self._count([decision], () if decision.allowed else (decision.limit_id,))
        return decision, record_id

    async def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """See ``Domain``; UNAVAILABLE while the store is away, and may be repeated then."""
        free = free_settlement(reservation_id, tokens)
        if free is not None:
            return free
        if reservation_id.startswith(_LOCAL):
            return self._local.settle(tenant, reservation_id[len(_LOCAL) :], tokens)
        answer = await self._store.settle(tenant, reservation_id, tokens)
        if answer is AWAY:
            raise store_away()
        repeated, adjustment, remaining = answer
        return Settlement(adjustment, repeated, remaining)

    async def lease(self, tenant: str, plan: SharedPlan, tokens: int) -> Leased:
        """See ``Domain``; nothing is leased while the store is away."""
        if not plan.counts:
            return Leased(unlimited(tokens), "", UNLIMITED_LEASE_S)
        refused = Decision(False, 0, 0, 0, 0.0, _AWAY_RETRY_S, plan.counts[0].limit.limit_id, True)
        if any(count.limit.strict for count in plan.counts):
            return Leased(refused._replace(degraded=False), "", 0.0, True)
        answer = await self._store.lease(tenant, plan.counts, tokens)
        if answer is None or answer is AWAY:
            return Leased(refused._replace(degraded=answer is AWAY), "", 0.0, True)
        decision, lease_id, ttl_us = answer
        return Leased(decision, lease_id, ttl_us / 1e6)

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """See ``Domain``."""
        answer = await self._store.return_lease(tenant, lease_id, unspent)
        if answer is AWAY:
            raise store_away()
        return answer

    async def acquire(
        self, tenant: str, plan: SharedPlan, slots: int, ttl_s: float
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        if not plan.counts:
            return self._local.acquire(tenant, (), slots, ttl_s)
        answer = await self._store.acquire(tenant, plan.counts, slots, ttl_s)
        if answer is AWAY:
            refusal = _closed(plan)
            if refusal is not None:
                return refusal, ""
            decision, slot_id = self._acquire_alone(plan, slots, ttl_s)
            return decision._replace(degraded=True), slot_id
        decision, slot_id = answer
        self._count([decision], () if decision.allowed else (decision.limit_id,))
        return decision, slot_id

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """See ``Domain``."""
        free_s = free_renewal(slot_id, ttl_s)
        if free_s is not None:
            return free_s
        if slot_id.startswith(_LOCAL):
            return self._local.renew(tenant, slot_id[len(_LOCAL) :], ttl_s)
        answer = await self._store.renew(tenant, slot_id, ttl_s)
        if answer is AWAY:
            raise store_away()
        return None if answer < 0 else answer / 1e6

    async def release(self, tenant: str, slot_id: str) -> bool:
        """See ``Domain``."""
        if free_quantity(slot_id) is not None:
            return True
        if slot_id.startswith(_LOCAL):
            return self._local.release(tenant, slot_id[len(_LOCAL) :])
        answer = await self._store.release(tenant, slot_id)
        if answer is AWAY:
            raise store_away()
        return bool(answer)

    async def usage(self, tenant: str, key: CountKey | None = None) -> Sequence[Usage]:
        """See ``Domain``."""
        rows = await self._store.usage(self.limits, tenant, key)
        if rows is AWAY:
            raise store_away()
        found = []
        for limit, counted, room, reset_us in rows:
            used = limit.size - room
            if len(self._peaks) >= _MAX_PEAKS:
                self._peaks.clear()
            peak = self._peaks[counted] = max(used, self._peaks.get(counted, 0))
            by = tuple(zip(limit.per, counted[4:], strict=True))
            found.append(
                Usage(
                    limit.limit_id,
                    tuple(each for each in by if each[0] != TENANT),
                    used,
                    max(0, room),
                    limit.size,
                    self._local.denied.get(limit.limit_id, 0),
                    peak,
                    reset_us / 1e6,
                )
            )
        return found

    # ---------------------------------------------------------------- within

    def _alone(self, ask: Ask) -> Decision:
        refusal = _closed(ask.plan)
        if refusal is not None:
            return refusal
        plan = ask.plan
        local = self._local.plan(plan.tenant, plan.name, plan.facts, own=plan.own)
        decision = self._local.decide(local, ask.hits, ask.allow_partial, self._local.clock())
        return decision._replace(degraded=True)

    def _reserve_alone(
        self, plan: SharedPlan, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        local = self._local.plan(plan.tenant, plan.name, plan.facts)
        decision, record_id = self._local.reserve(
            plan.tenant, plan.name, local, tokens, ttl_s, request_id
        )
        return decision, _LOCAL + record_id if record_id else ""

    def _acquire_alone(self, plan: SharedPlan, slots: int, ttl_s: float) -> tuple[Decision, str]:
        local = self._local.plan(plan.tenant, plan.name, plan.facts, slots=True)
        decision, slot_id = self._local.acquire(plan.tenant, local, slots, ttl_s)
        return decision, _LOCAL + slot_id if slot_id else ""

    def _count(self, decided: Sequence[Decision], denied: Sequence[str]) -> None:
        self._local.allowed += sum([decision.allowed for decision in decided])
        for limit_id in denied:
            self._local.denied[limit_id] = self._local.denied.get(limit_id, 0) + 1


_MAX_PEAKS: Final = 100_000


def _closed(plan: SharedPlan) -> Decision | None:
    """The denial of the first limit that is closed while the store is away."""
    for count in plan.counts:
        limit = count.limit
        if limit.failure_mode is FailureMode.CLOSED and not limit.shadow:
            return Decision(False, 0, 0, limit.size, 0.0, _AWAY_RETRY_S, limit.limit_id, True)
    return None
