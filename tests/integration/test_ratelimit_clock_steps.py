"""Redis' clock is set forward and back: what is promised then, with replicas old and new."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.clocked_redis import ClockedRedis

from agent360.mesh.ratelimit.decisions import Decision
from agent360.mesh.ratelimit.domain import Ask
from agent360.mesh.ratelimit.limits import Algorithm, Limit, LimitSet
from agent360.mesh.ratelimit.sharing import AWAY, Run
from agent360.mesh.ratelimit.stores.redis import RedisStore

S = 1_000_000
LIMITS = LimitSet(
    [
        Limit("bucket", 10, 10.0, name="bucket"),
        Limit("sliding", 10, 10.0, name="sliding", algorithm=Algorithm.SLIDING_WINDOW),
        Limit("fixed", 10, 10.0, name="fixed", algorithm=Algorithm.FIXED_WINDOW),
        Limit("slots", 4, name="slots", algorithm=Algorithm.CONCURRENCY),
    ]
)
NAMES = ["bucket", "sliding", "fixed"]


@pytest.fixture
async def redis() -> AsyncIterator[ClockedRedis]:
    async with ClockedRedis() as redis:
        yield redis


async def check(store: RedisStore, name: str, hits: int = 1) -> Decision:
    counts = store.counts(LIMITS, "acme", name, {})
    (answer,) = await store.decide([Run(Ask(counts, hits, False), 1)])
    assert answer is not AWAY
    return answer[0][0]


async def acquire(store: RedisStore, slots: int, ttl_s: float) -> tuple[Decision, str]:
    counts = store.counts(LIMITS, "acme", "slots", {}, slots=True)
    answer = await store.acquire("acme", counts, slots, ttl_s)
    assert answer is not AWAY
    return answer


async def admitted(redis: ClockedRedis, stores: list[RedisStore], name: str, seconds: int) -> int:
    """How much is admitted where every replica asks for all it can get, ten times a second."""
    total = 0
    for _ in range(10 * seconds):
        await redis.advance(S // 10)
        for store in stores:
            while (await check(store, name)).allowed:
                total += 1
    return total


@pytest.mark.parametrize("name", NAMES)
async def test_a_clock_that_is_set_back_makes_nobody_wait_longer_than_was_said(
    redis: ClockedRedis, name: str
) -> None:
    store = redis.store()
    assert (await check(store, name, 10)).allowed
    await redis.advance(S)
    denied = await check(store, name, 10)
    assert denied.retry_after_s is not None
    await redis.step(-30 * S)
    still = await check(store, name, 10)
    assert still.retry_after_s == pytest.approx(denied.retry_after_s, abs=0.001)
    # Time goes on at 95% until the clock has caught up.
    await redis.advance(round(denied.retry_after_s / 0.95 * S) + 1_000)
    assert (await check(store, name, 10)).allowed


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [-30, -5])
async def test_a_clock_that_is_set_back_admits_no_more_by_replicas_old_and_new(
    redis: ClockedRedis, name: str, step: int
) -> None:
    old = redis.store()
    before = await admitted(redis, [old], name, 5)
    await redis.step(step * S)
    after = await admitted(redis, [old, redis.store()], name, 20)
    most = {"bucket": 10 + 25, "sliding": 30, "fixed": 40}
    assert before + after <= most[name]
    assert after >= 10


@pytest.mark.parametrize("name", NAMES)
async def test_replicas_that_start_after_the_clock_was_set_back_take_over_the_time(
    redis: ClockedRedis, name: str
) -> None:
    assert (await check(redis.store(), name, 10)).allowed
    await redis.step(-30 * S)
    new = redis.store()
    denied = await check(new, name, 10)
    assert denied.retry_after_s is not None
    assert denied.retry_after_s <= 11
    await redis.advance(round(denied.retry_after_s / 0.95 * S) + 1_000)
    assert (await check(new, name, 10)).allowed


@pytest.mark.parametrize("name", NAMES)
async def test_a_clock_that_is_set_forward_admits_one_amount_more(
    redis: ClockedRedis, name: str
) -> None:
    store = redis.store()
    before = await admitted(redis, [store], name, 5)
    await redis.step(30 * S)
    after = await admitted(redis, [store], name, 20)
    most = {"bucket": 10 + 25, "sliding": 30, "fixed": 40}
    assert before + after <= most[name] + 10
    # And back, as when a wrong clock is put right: nothing more.
    await redis.step(-30 * S)
    again = await admitted(redis, [store, redis.store()], name, 10)
    assert again <= {"bucket": 11, "sliding": 10, "fixed": 20}[name]


@pytest.mark.parametrize("name", NAMES)
async def test_a_clock_that_is_set_back_by_an_hour_frees_nothing_and_locks_for_a_period(
    redis: ClockedRedis, name: str
) -> None:
    store = redis.store()
    assert (await check(store, name, 10)).allowed
    await redis.step(-3_600 * S)
    denied = await check(store, name)
    assert not denied.allowed
    await redis.advance(22 * S)
    assert (await check(store, name, 10)).allowed


async def test_slots_of_the_dead_come_back_in_their_time_though_the_clock_is_set_back(
    redis: ClockedRedis,
) -> None:
    old = redis.store()
    _, dead = await acquire(old, 2, 10.0)
    _, alive = await acquire(old, 2, 10.0)
    await redis.advance(5 * S)
    assert not (await acquire(old, 1, 10.0))[0].allowed
    await redis.step(-30 * S)
    new = redis.store()
    assert await new.renew("acme", alive, None) == 10 * S
    assert not (await acquire(new, 1, 10.0))[0].allowed
    await redis.advance(5_400_000)  # time goes on at 95% until the clock has caught up
    for store in (old, new):
        decision, _ = await acquire(store, 2, 10.0)
        assert decision.allowed is (store is old), "two came back, and only two"
    assert await old.release("acme", dead) == 0
    assert await new.renew("acme", alive, None) == 10 * S


async def test_slots_come_back_early_when_the_clock_is_set_forward_and_their_holder_is_told(
    redis: ClockedRedis,
) -> None:
    store = redis.store()
    _, slot_id = await acquire(store, 4, 10.0)
    await redis.step(30 * S)
    assert (await acquire(store, 4, 10.0))[0].allowed
    answer: Any = await store.renew("acme", slot_id, None)
    assert answer < 0
