"""A decision tells of one limit, and usage of what each tenant and limit was charged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import structlog
from support.polling import eventually
from support.redis_servers import RedisServer

from agent360.mesh.ratelimit.deadline import Deadline
from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask, LocalDomain
from agent360.mesh.ratelimit.limiter import Limiter
from agent360.mesh.ratelimit.limits import Algorithm, FailureMode, Limit, LimitSet
from agent360.mesh.ratelimit.replica_leases import ReplicaLeases
from agent360.mesh.ratelimit.shared_domain import SharedDomain
from agent360.mesh.ratelimit.shared_usage import SharedUsage
from agent360.mesh.ratelimit.stores.redis import RedisStore, RedisUsageTable
from agent360.mesh.runtime.redis import Redis, RedisSettings

NOW_US = 1_790_000_000_000_000
FIXED = Algorithm.FIXED_WINDOW
LIMITS = LimitSet(
    [
        Limit("everybody", 100_000, 36_000.0, name="all", per=(), algorithm=FIXED),
        Limit("first", 3, 36_000.0, name="one", algorithm=FIXED),
        Limit("second", 2, 36_000.0, name="two", algorithm=FIXED),
        Limit("tried", 100, 36_000.0, name="tried", algorithm=FIXED, shadow=True),
        Limit("tried-less", 5, 36_000.0, name="tried", algorithm=FIXED, shadow=True),
        Limit("tried-slots", 9, name="tried", algorithm=Algorithm.CONCURRENCY, shadow=True),
        Limit("small", 10, 36_000.0, name="both", algorithm=FIXED),
        Limit("full", 30, 36_000.0, name="b*", algorithm=FIXED),
        Limit("few-slots", 2, name="both", algorithm=Algorithm.CONCURRENCY),
        Limit("many-slots", 3, name="b*", algorithm=Algorithm.CONCURRENCY),
        Limit("closed", 9, 36_000.0, name="shut", failure_mode=FailureMode.CLOSED),
    ]
)


class Shared:
    """A domain on a Redis of its own."""

    async def start(self) -> SharedDomain:
        self.server = RedisServer()
        await self.server.__aenter__()
        log = structlog.get_logger()
        redis = Redis(self.server.url, RedisSettings(timeout_s=2), log)
        store = RedisStore(
            redis, log, prefix="p", answer_s=2.0, lease_ttl_s=30.0, records_kept_s=9.0
        )
        usage = SharedUsage(RedisUsageTable(redis, "p", log), log)
        self.leases = ReplicaLeases(store, usage)
        local = Limiter(LIMITS, lambda: NOW_US)
        self.domain = SharedDomain(store, local, usage, self.leases, Deadline(2.0))
        self.domain.replace_limits(LIMITS)
        await self.domain.start()
        return self.domain

    async def close(self) -> None:
        await self.domain.close()
        await self.server.__aexit__(None, None, None)


@pytest.fixture
async def shared() -> AsyncIterator[Shared]:
    started = Shared()
    await started.start()
    yield started
    await started.close()


@pytest.fixture(params=["memory", "redis"])
async def domain(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield LocalDomain(Limiter(LIMITS, lambda: NOW_US))
        return
    started = Shared()
    yield await started.start()
    await started.close()


async def check(domain: Any, name: str, hits: int = 1, partial: bool = False) -> Decision:
    ask = Ask(domain.plan("acme", name, {}), hits, partial)
    decided: Sequence[Decision] = await domain.decide([ask])
    return decided[0]


async def usage(domain: Any, tenant: str = "acme") -> dict[str, tuple[int, int]]:
    """What is used of each limit, and its peak."""
    found: Sequence[Any] = list(await domain.usage(tenant))
    return {each.limit_id: (each.used, each.peak) for each in found}


async def test_leased_tokens_of_a_limit_of_all_are_told_to_the_tenant_that_spent_them(
    shared: Shared,
) -> None:
    domain = shared.domain
    asks = {name: Ask(domain.plan(name, "all", {}), 1, False) for name in ("ana", "bob")}
    for ask in asks.values():
        await domain.decide([ask] * 200)
    await eventually(lambda: shared.leases.open)
    for _ in range(300):
        for ask in asks.values():
            await domain.decide([ask])
    await shared.leases.close()
    for name in asks:
        assert (await usage(domain, name))["everybody"][0] == 500


async def test_while_the_store_is_away_the_open_limits_of_all_plans_of_a_request_count(
    shared: Shared,
) -> None:
    domain = shared.domain
    joint = domain.join([domain.plan("acme", name, {}) for name in ("one", "two")])
    await shared.server.kill()
    decisions = [(await domain.decide([Ask(joint, 1, False)]))[0] for _ in range(4)]
    assert all(each.degraded for each in decisions)
    assert [each.allowed for each in decisions] == [True, True, False, False]
    assert {each.limit_id for each in decisions} == {"second"}


async def test_where_only_shadow_limits_apply_the_tightest_of_them_is_told_of(domain: Any) -> None:
    first = await check(domain, "tried", 2)
    assert first[:4] == (True, 2, 3, 5)
    assert first.limit_id == "tried-less"
    assert (await check(domain, "tried", 0)).remaining == 3
    assert await usage(domain) == {"tried-less": (2, 2), "tried": (2, 2)}
    over = await check(domain, "tried", 9)
    assert over[:4] == (True, 9, 0, 5)
    look = await check(domain, "tried", 0)
    assert (look.allowed, look.remaining, look.limit_id) == (True, 0, "tried-less")
    decision, _ = await domain.reserve("acme", "x", domain.plan("acme", "tried", {}), 3, 9.0, "")
    assert decision.allowed
    slots = domain.plan("acme", "tried", {}, slots=True)
    held, _ = await domain.acquire("acme", slots, 2, 9.0)
    assert (held.allowed, held.remaining, held.limit_id) == (True, 7, "tried-slots")
    held, _ = await domain.acquire("acme", slots, 8, 9.0)
    assert (held.allowed, held.granted, held.remaining) == (True, 8, 0)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_denial_tells_all_of_the_limit_that_denied_for_longest(
    domain: Any, times: int
) -> None:
    assert (await check(domain, "bulk", 29)).remaining == 1
    ask = Ask(domain.plan("acme", "both", {}), 25, False)
    for denied in await domain.decide([ask] * times):
        assert denied[:4] == (False, 0, 10, 10)
        assert (denied.limit_id, denied.retry_after_s) == ("small", None)
    used = await usage(domain)
    assert (used["full"], used.get("small", (0, 0))) == ((29, 29), (0, 0))
    slots = {name: domain.plan("acme", name, {}, slots=True) for name in ("bulk", "both")}
    assert (await domain.acquire("acme", slots["bulk"], 2, 9.0))[0].remaining == 1
    denied, _ = await domain.acquire("acme", slots["both"], 3, 9.0)
    assert (denied.limit_id, denied.limit, denied.remaining) == ("few-slots", 2, 2)
