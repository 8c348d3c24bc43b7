"""The domain on a store that replicas share, and what it answers while that is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

from agent360.mesh.ratelimit.counts import CountKey
from agent360.mesh.ratelimit.deadline import Deadline
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
from agent360.mesh.ratelimit.limits import FailureMode, Limit, LimitSet
from agent360.mesh.ratelimit.record_ids import Kind
from agent360.mesh.ratelimit.replica_leases import HotLimits, ReplicaLeases
from agent360.mesh.ratelimit.shared_usage import SharedUsage
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
    override: Limit | None
    hot: HotLimits | None
    """Where tokens of its limits may be held."""
    one_step: bool
    """Whether many requests may be decided by one step: the counts are in one place, and none is
    of a limit in shadow mode."""
    others: tuple[SharedPlan, ...] = ()
    """The further plans that were joined to this one."""


class SharedDomain:
    """Decides with a shared store.

    While the store is away, a limit whose failure mode is closed denies; the others are counted by
    this replica alone, so that each replica admits no more than the limit. Such answers are marked
    degraded. Reservations and slots made meanwhile are this replica's.
    """

    def __init__(
        self,
        store: SharedStore,
        local: Limiter,
        usage: SharedUsage,
        leases: ReplicaLeases,
        deadline: Deadline,
    ) -> None:
        """Makes a domain.

        Args:
            store: has the counts.
            local: stands in for it; knows the limits.
            usage: told of what is decided.
            leases: decides what it holds tokens for.
            deadline: until when the store is waited for.
        """
        self._store = store
        store.on_adjusted = usage.note_adjustment
        self._local = local
        self._generation = 0
        self._gatherer = Gatherer(self._decide)
        self._usage = usage
        self._leases = leases
        self._deadline = deadline

    async def start(self) -> None:
        """Returns when the store can be asked."""
        await self._store.start()
        self._usage.start()

    async def close(self) -> None:
        """Tells and gives back what there is, and closes the store."""
        await self._leases.close()
        await self._usage.close()
        await self._store.close()

    @property
    def generation(self) -> int:
        """See ``Domain``."""
        return self._generation

    @property
    def limits(self) -> LimitSet:
        """See ``Domain``."""
        return self._local.counts.limits

    def replace_limits(self, limits: LimitSet) -> None:
        """See ``Domain``."""
        self._local.counts.replace_limits(limits)
        self._leases.replace_limits(limits)
        self._generation += 1

    def plan(
        self,
        tenant: str,
        name: str,
        facts: Mapping[str, str],
        *,
        slots: bool = False,
        own: bool = False,
        override: Limit | None = None,
    ) -> SharedPlan:
        """See ``Domain``."""
        counts = self._store.counts(
            self.limits, tenant, name, facts, slots=slots, own=own, override=override
        )
        hot = None if slots or override is not None else self._leases.of(tenant, counts)
        one_step = self._in_one_step(counts)
        return SharedPlan(counts, tenant, name, facts, slots, own, override, hot, one_step)

    def join(self, plans: Sequence[SharedPlan]) -> SharedPlan:
        """See ``Domain``."""
        counts = tuple({count.key: count for plan in plans for count in plan.counts}.values())
        return plans[0]._replace(
            counts=counts, hot=None, one_step=self._in_one_step(counts), others=tuple(plans[1:])
        )

    async def decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        """See ``Domain``."""
        if not self._leases.open:
            return await self._ask(asks)
        spent = self._spend(asks)
        left = [ask for ask, decision in zip(asks, spent, strict=True) if decision is None]
        decided = iter(await self._ask(left) if left else ())
        return [next(decided) if decision is None else decision for decision in spent]

    async def _ask(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        answer = await self._deadline.keep(self._gatherer.decide(asks))
        return [self._alone(ask) for ask in asks] if answer is AWAY else answer

    def _spend(self, asks: Sequence[Ask]) -> list[Decision | None]:
        """The decisions that tokens are at hand for."""
        now = monotonic()
        spent: list[Decision | None] = []
        for ask in asks:
            hot, decision = ask.plan.hot, None
            if hot is not None and ask.hits:
                decision = self._leases.spend(hot, ask.hits, now)
                if decision is not None:
                    self._local.allowed += 1
            spent.append(decision)
        return spent

    async def _decide(self, asks: Sequence[Ask]) -> Sequence[Decision]:
        runs = self._runs(asks)
        limited = [
            Run(Ask(ask.plan.counts, ask.hits, ask.allow_partial), times)
            for ask, times in runs
            if ask.plan.counts
        ]
        answers = iter(await self._store.decide(limited) if limited else ())
        now_us = self._usage.now_us() if limited else 0
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
            self._note(ask.plan, decided, denied, now_us=now_us)
            if ask.plan.hot is not None and ask.hits:
                self._leases.note(ask.plan.hot, decided)
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
            mergeable = ask.hits > 0 and not ask.allow_partial and ask.plan.one_step
        if last is not None:
            runs.append(Run(last, times))
        return runs

    def _in_one_step(self, counts: tuple[Any, ...]) -> bool:
        return not any(count.limit.shadow for count in counts) and (
            not counts or self._store.in_one_place(counts)
        )

    async def reserve(
        self, tenant: str, name: str, plan: SharedPlan, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        if not plan.counts:
            return self._local.reserve(tenant, name, (), tokens, ttl_s, request_id)
        answer = await self._deadline.keep(
            self._store.reserve(tenant, name, plan.counts, tokens, ttl_s, request_id)
        )
        if answer is AWAY:
            decision, record_id = self._reserve_alone(plan, tokens, ttl_s, request_id)
            self._note_alone(plan, decision)
            return decision, record_id
        decision, record_id = answer
        denied = () if decision.allowed else (decision.limit_id,)
        self._note(plan, [decision], denied, record_id)
        return decision, record_id

    async def settle(self, tenant: str, reservation_id: str, tokens: int) -> Settlement:
        """See ``Domain``; UNAVAILABLE while the store is away, and may be repeated then."""
        free = free_settlement(reservation_id, tokens)
        if free is not None:
            return free
        if reservation_id.startswith(_LOCAL):
            return self._local.settle(tenant, reservation_id[len(_LOCAL) :], tokens)
        answer = await self._deadline.keep(
            self._store.settle(self.limits, tenant, reservation_id, tokens)
        )
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
        answer = await self._deadline.keep(self._store.lease(tenant, plan.counts, tokens))
        if answer is None or answer is AWAY:
            return Leased(refused._replace(degraded=answer is AWAY), "", 0.0, True)
        decision, lease_id, ttl_us = answer
        if decision.granted:
            used = decision.limit - decision.remaining
            self._usage.note(tenant, plan.counts, decision.granted, (), decision.limit_id, used)
        return Leased(decision, lease_id, ttl_us / 1e6)

    async def return_lease(self, tenant: str, lease_id: str, unspent: int) -> int:
        """See ``Domain``."""
        answer = await self._deadline.keep(
            self._store.return_lease(self.limits, tenant, lease_id, unspent)
        )
        if answer is AWAY:
            raise store_away()
        return answer

    async def acquire(
        self, tenant: str, plan: SharedPlan, slots: int, ttl_s: float
    ) -> tuple[Decision, str]:
        """See ``Domain``."""
        if not plan.counts:
            return self._local.acquire(tenant, (), slots, ttl_s)
        answer = await self._deadline.keep(self._store.acquire(tenant, plan.counts, slots, ttl_s))
        if answer is AWAY:
            decision, slot_id = self._acquire_alone(plan, slots, ttl_s)
            self._note_alone(plan, decision)
            return decision, slot_id
        decision, slot_id = answer
        self._note(plan, [decision], () if decision.allowed else (decision.limit_id,))
        return decision, slot_id

    async def renew(self, tenant: str, slot_id: str, ttl_s: float | None) -> float | None:
        """See ``Domain``."""
        free_s = free_renewal(slot_id, ttl_s)
        if free_s is not None:
            return free_s
        if slot_id.startswith(_LOCAL):
            return self._local.renew(tenant, slot_id[len(_LOCAL) :], ttl_s)
        answer = await self._deadline.keep(self._store.renew(tenant, slot_id, ttl_s))
        if answer is AWAY:
            raise store_away()
        return None if answer < 0 else answer / 1e6

    async def release(self, tenant: str, slot_id: str) -> bool:
        """See ``Domain``."""
        if free_quantity(Kind.SLOTS, slot_id) is not None:
            return True
        if slot_id.startswith(_LOCAL):
            return self._local.release(tenant, slot_id[len(_LOCAL) :])
        answer = await self._deadline.keep(self._store.release(tenant, slot_id))
        if answer is AWAY:
            raise store_away()
        return bool(answer)

    async def usage(
        self, tenant: str, key: CountKey | None = None, *, together: bool = False
    ) -> Sequence[Usage]:
        """See ``Domain``."""
        return await self._usage.usage(self.limits, tenant, key, together)

    # ---------------------------------------------------------------- within

    def _alone(self, ask: Ask) -> Decision:
        plan = ask.plan
        refusal = _closed(plan)
        if refusal is not None:
            self._note_alone(plan, refusal)
            return refusal
        charges = [
            charge
            for each in (plan, *plan.others)
            for charge in self._local.plan(
                each.tenant, each.name, each.facts, own=each.own, override=each.override
            )
        ]
        local = tuple(dict.fromkeys(charges))
        decision = self._local.decide(local, ask.hits, ask.allow_partial, self._local.clock())
        self._note_alone(plan, decision)
        return decision._replace(degraded=True)

    def _reserve_alone(
        self, plan: SharedPlan, tokens: int, ttl_s: float, request_id: str
    ) -> tuple[Decision, str]:
        refusal = _closed(plan)
        if refusal is not None:
            return refusal, ""
        local = self._local.plan(plan.tenant, plan.name, plan.facts)
        decision, record_id = self._local.reserve(
            plan.tenant, plan.name, local, tokens, ttl_s, request_id
        )
        return decision._replace(degraded=True), _LOCAL + record_id if record_id else ""

    def _acquire_alone(self, plan: SharedPlan, slots: int, ttl_s: float) -> tuple[Decision, str]:
        refusal = _closed(plan)
        if refusal is not None:
            return refusal, ""
        local = self._local.plan(plan.tenant, plan.name, plan.facts, slots=True)
        decision, slot_id = self._local.acquire(plan.tenant, local, slots, ttl_s)
        return decision._replace(degraded=True), _LOCAL + slot_id if slot_id else ""

    def _note(
        self,
        plan: SharedPlan,
        decided: Sequence[Decision],
        denied: Sequence[str],
        record_id: str = "",
        now_us: int = 0,
    ) -> None:
        allowed = [decision[1] for decision in decided if decision[0]]
        self._local.allowed += len(allowed)
        for limit_id in denied:
            self._local.denied[limit_id] = self._local.denied.get(limit_id, 0) + 1
        granted = sum(allowed)
        fullest = decided[-1]  # the same request, one after the other: less is left each time
        self._usage.note(
            plan.tenant,
            plan.counts,
            granted,
            denied,
            fullest.limit_id,
            fullest.limit - fullest.remaining,
            record_id,
            now_us,
        )

    def _note_alone(self, plan: SharedPlan, decision: Decision) -> None:
        """What was decided without the store is charged to nothing that it counts."""
        if not decision.allowed:
            self._usage.note(plan.tenant, plan.counts, 0, (decision.limit_id,))


def _closed(plan: SharedPlan) -> Decision | None:
    """The denial of the first limit that is closed while the store is away."""
    for count in plan.counts:
        limit = count.limit
        if limit.failure_mode is FailureMode.CLOSED and not limit.shadow:
            return Decision(False, 0, 0, limit.size, 0.0, _AWAY_RETRY_S, limit.limit_id, True)
    return None
