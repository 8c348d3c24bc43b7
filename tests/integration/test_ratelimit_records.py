"""Reservations, leases and slots in a shared store: made once, undone wholly, told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import structlog
from support.clocked_redis import ClockedRedis
from support.redis_servers import RedisClusterServers, RedisServer

from agent360.client.errors import MeshError
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, Run
from agent360.mesh.ratelimit.stores.redis import RedisStore
from agent360.mesh.ratelimit.windows import Calendar
from agent360.mesh.runtime.redis import Redis, RedisSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

FIXED = Algorithm.FIXED_WINDOW
EACH = Limit("each", 50, 36_000.0, name="x", algorithm=FIXED)
ALL = Limit("all", 60, 36_000.0, name="x", per=(), algorithm=FIXED)
LIMITS = LimitSet([EACH, ALL, Limit("slots", 4, name="x", algorithm=Algorithm.CONCURRENCY)])
HOUR_US = 3_600_000_000


@pytest_asyncio.fixture(params=["redis", "cluster"], scope="module", loop_scope="module")
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Redis]:
    async with RedisServer() if request.param == "redis" else RedisClusterServers() as servers:
        redis = Redis(servers.url, RedisSettings(timeout_s=5), structlog.get_logger())
        await redis.start()
        yield redis
        await redis.close()


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Of keys that no other test uses."""
    name: str = request.node.name
    return name.partition("[")[0]


@pytest.fixture
def store(redis: Redis, prefix: str) -> RedisStore:
    return a_store(redis, prefix)


def a_store(redis: Redis, prefix: str) -> RedisStore:
    return RedisStore(
        redis, structlog.get_logger(), prefix=prefix, answer_s=5.0, lease_ttl_s=1.0,
        records_kept_s=3_600.0,
    )  # fmt: skip


async def reserve(
    store: RedisStore, tenant: str, tokens: int, request_id: str = "", limits: LimitSet = LIMITS
) -> tuple[bool, str]:
    counts = store.counts(limits, tenant, "x", {})
    answer = await store.reserve(tenant, "x", counts, tokens, 60.0, request_id)
    assert answer is not AWAY
    decision, reservation_id = answer
    assert decision.allowed is bool(reservation_id)
    return decision.allowed, reservation_id


async def left(store: RedisStore, tenant: str, limits: LimitSet = LIMITS) -> dict[str, int]:
    """What is left of each limit."""
    found = {}
    for limit in limits:
        if limit.algorithm is not Algorithm.CONCURRENCY:
            counts = store.counts(LimitSet([limit]), tenant, "x", {})
            (answer,) = await store.decide([Run(Ask(counts, 0, False), 1)])
            assert answer is not AWAY
            found[limit.limit_id] = answer[0][0].remaining
    return found


async def test_a_reserve_that_another_slot_denied_is_not_believed_allowed_when_it_is_repeated(
    store: RedisStore,
) -> None:
    _, other = await reserve(store, "globex", 40)
    for _ in range(3):
        assert not (await reserve(store, "acme", 30, "r-1"))[0]
        assert await left(store, "acme") == {"each": 50, "all": 20}
    await store.settle(LIMITS, "globex", other, 10)
    made = [await reserve(store, "acme", 30, "r-1") for _ in range(3)]
    assert len({reservation_id for _, reservation_id in made}) == 1
    assert await left(store, "acme") == {"each": 20, "all": 20}
    _, reservation_id = made[0]
    assert await store.settle(LIMITS, "acme", reservation_id, 5) == (False, -25, 45)
    assert await store.settle(LIMITS, "acme", reservation_id, 5) == (True, 0, 45)
    assert await left(store, "acme") == {"each": 45, "all": 45}


async def test_the_same_request_asked_of_two_replicas_at_once_is_charged_once(
    redis: Redis, prefix: str, store: RedisStore
) -> None:
    again = a_store(redis, prefix)
    for number in range(20):
        stores = [store, again, store]
        made = await asyncio.gather(*(reserve(each, "acme", 2, f"r-{number}") for each in stores))
        assert {allowed for allowed, _ in made} == {True}
        assert len({reservation_id for _, reservation_id in made}) == 1
    assert await left(store, "acme") == {"each": 10, "all": 20}


async def test_denied_and_repeated_reserves_of_one_request_leave_nothing_charged(
    store: RedisStore,
) -> None:
    _, other = await reserve(store, "globex", 40)
    made = await asyncio.gather(*(reserve(store, "acme", 30, "r-1") for _ in range(20)))
    assert {allowed for allowed, _ in made} == {False}
    assert await left(store, "acme") == {"each": 50, "all": 20}
    assert await store.settle(LIMITS, "globex", other, 0) == (False, -40, 50)


async def test_ids_of_requests_are_told_apart_by_tenant_and_name(store: RedisStore) -> None:
    ids = [(await reserve(store, tenant, 1, "r-1"))[1] for tenant in ("acme", "globex")]
    counts = store.counts(LIMITS, "acme", "x", {})
    answer: Any = await store.reserve("acme", "y", counts, 1, 60.0, "r-1")
    assert len({*ids, answer[1]}) == 3
    with pytest.raises(MeshError, match="RESERVATION_UNKNOWN"):
        await store.settle(LIMITS, "globex", ids[0], 0)


async def test_an_id_of_another_kind_is_refused_by_name_and_changes_nothing(
    store: RedisStore,
) -> None:
    _, reservation_id = await reserve(store, "acme", 5)
    own = LimitSet([replace(EACH, limit_id="own")])
    leased: Any = await store.lease("acme", store.counts(own, "acme", "x", {}), 4)
    lease_id = leased[1]
    counts = store.counts(LIMITS, "acme", "x", {}, slots=True)
    acquired: Any = await store.acquire("acme", counts, 2, 60.0)
    slot_id = acquired[1]
    for record_id, kind in ((lease_id, "a lease"), (slot_id, "slots")):
        with pytest.raises(MeshError, match=f"RECORD_OF_ANOTHER_KIND.*id of {kind}"):
            await store.settle(LIMITS, "acme", record_id, 0)
    for record_id in (reservation_id, slot_id):
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            await store.return_lease(LIMITS, "acme", record_id, 1)
    for record_id in (reservation_id, lease_id):
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            await store.release("acme", record_id)
        with pytest.raises(MeshError, match="RECORD_OF_ANOTHER_KIND"):
            await store.renew("acme", record_id, None)
    with pytest.raises(MeshError, match="RESERVATION_UNKNOWN"):
        await store.settle(LIMITS, "acme", "r-" + lease_id[2:], 0)
    assert await store.release("acme", "s-" + reservation_id[2:]) == 0
    assert await store.settle(LIMITS, "acme", reservation_id, 5) == (False, 0, 45)
    assert await store.return_lease(LIMITS, "acme", lease_id, 4) == 4
    assert await store.release("acme", slot_id) == 1


async def test_a_settle_after_the_amount_was_lowered_leaves_no_more_than_the_limit(
    store: RedisStore,
) -> None:
    _, reservation_id = await reserve(store, "acme", 40)
    lowered = LimitSet([replace(EACH, amount=10), replace(ALL, amount=20)])
    assert await store.settle(lowered, "acme", reservation_id, 3) == (False, -37, 7)
    assert await left(store, "acme", lowered) == {"each": 7, "all": 17}


@pytest.mark.parametrize("calendar", list(Calendar))
async def test_a_settle_many_windows_late_charges_what_was_used_once(calendar: Calendar) -> None:
    limit = Limit(
        "quota", 100, calendar.length_s, name="x", algorithm=FIXED, calendar=calendar,
        time_zone="Europe/Berlin",
    )  # fmt: skip
    limits = LimitSet([limit])
    async with ClockedRedis() as redis:
        store = redis.store()
        for settled, adjustment, remaining in ((70, 20, 80), (30, -20, 100)):
            _, reservation_id = await reserve(store, "acme", 50, limits=limits)
            await redis.advance(round(9.3 * calendar.length_s * 1e6))
            answer = await store.settle(limits, "acme", reservation_id, settled)
            assert answer == (False, adjustment, remaining)
            assert await store.settle(limits, "acme", reservation_id, settled) == (
                True, 0, remaining,
            )  # fmt: skip
            assert await left(store, "acme", limits) == {"quota": remaining}
            await redis.advance(round(2 * calendar.length_s * 1e6))


async def test_a_late_settle_of_a_limit_that_is_gone_is_no_error() -> None:
    limit = Limit("quota", 100, 3_600.0, name="x", algorithm=FIXED, calendar=Calendar.HOUR)
    async with ClockedRedis() as redis:
        store = redis.store()
        _, reservation_id = await reserve(store, "acme", 50, limits=LimitSet([limit]))
        await redis.advance(30 * HOUR_US)
        answer = await store.settle(LimitSet([]), "acme", reservation_id, 70)
        assert answer == (False, 20, 80)
