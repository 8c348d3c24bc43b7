"""Of all callers that miss a key one fills it, and nobody gets what is outdated."""

import asyncio

import pytest
from support.cache_domain import Cache, at_once

from agent360.client.errors import InvalidRequestError, MeshError
from agent360.mesh.cache.changes import Stored
from agent360.mesh.cache.claims import Claim, Claimed
from agent360.mesh.cache.entry import Payload


def claim(cache: Cache, key: str = "k", *, stale: bool = False, timeout_s: float = 10.0):
    return cache.service.claim(cache.plans, key, stale, timeout_s, cache.clock.now())


def token_of(claimed: Claimed | Claim) -> str:
    assert isinstance(claimed, Claimed)
    assert claimed.grant is not None
    return claimed.grant.token


def fill(
    cache: Cache,
    token: str,
    value: bytes = b"loaded",
    *,
    key: str = "k",
    tenant: str = "acme",
    tags: tuple[str, ...] = (),
) -> Stored:
    payload = Payload(value, 60.0, 0.0, "", tags)
    return cache.service.fill(tenant, token, "plans", key, payload, cache.clock.now())


def waiting(cache: Cache, count: int = 1) -> list[asyncio.Task[Claimed]]:
    """Callers that claimed a key which is being filled."""
    tasks = []
    for _ in range(count):
        open_claim = claim(cache)
        assert isinstance(open_claim, Claim)
        tasks.append(asyncio.create_task(cache.service.wait(open_claim, 10.0)))
    return tasks


async def soon(task: asyncio.Task[Claimed]) -> Claimed:
    """What a caller gets; it fails instead of hanging if that is nothing."""
    return await asyncio.wait_for(task, 5.0)


async def test_one_caller_fills_and_all_who_wait_get_its_value() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    waiters = waiting(cache, 20)
    await asyncio.sleep(0)
    assert fill(cache, token).stored
    results = await asyncio.gather(*waiters)
    assert {(each.entry.value, each.grant) for each in results} == {(b"loaded", None)}
    assert cache.value("k") == b"loaded"
    assert cache.plans.counts.fills == 1


def test_the_claim_of_a_key_leaves_other_keys_namespaces_and_tenants_alone() -> None:
    cache = Cache()
    tokens = {token_of(claim(cache, key)) for key in ("k", "l")}
    for space in (cache.space("acme", "answers"), cache.space("globex")):
        tokens.add(token_of(cache.service.claim(space, "k", False, 10.0, cache.clock.now())))
    assert len(tokens) == 4


def test_while_a_stale_entry_is_refreshed_others_get_it_at_once() -> None:
    cache = Cache()
    cache.put("k", b"old", ttl_s=1.0, stale_ttl_s=60.0)
    cache.clock.advance(2.0)
    first = claim(cache, stale=True)
    assert first.entry.value == b"old"
    assert token_of(first)
    assert claim(cache, stale=True) == Claimed(first.entry, None)
    assert isinstance(claim(cache, stale=False), Claim)
    fill(cache, token_of(first), b"new")
    assert claim(cache).entry.value == b"new"


def test_a_fresh_entry_needs_no_claim() -> None:
    cache = Cache()
    cache.put("k")
    assert claim(cache).grant is None


async def test_a_fill_that_takes_too_long_frees_the_key_for_the_next_who_waits() -> None:
    cache = Cache()
    late = token_of(claim(cache, timeout_s=5.0))
    first, second = waiting(cache, 2)
    await asyncio.sleep(0)
    cache.clock.advance(4.999)
    await asyncio.sleep(0)
    assert not first.done()
    cache.clock.advance(0.001)
    taken_over = token_of(await soon(first))
    assert fill(cache, late, b"late") == Stored(False, 0)
    assert not second.done()
    assert fill(cache, taken_over, b"in time").stored
    assert (await soon(second)).entry.value == b"in time"


def test_a_fill_that_takes_too_long_frees_a_key_nobody_waits_for() -> None:
    cache = Cache()
    late = token_of(claim(cache, timeout_s=5.0))
    cache.clock.advance(5.0)
    assert not fill(cache, late, b"late").stored
    assert cache.value("k") is None
    assert token_of(claim(cache)) != late


def test_a_token_fills_once() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    stored = fill(cache, token, b"1")
    assert fill(cache, token, b"2") == Stored(False, stored.version)
    assert cache.value("k") == b"1"


def test_a_token_is_of_its_tenant_and_of_its_key() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    assert not fill(cache, token, tenant="globex").stored
    with pytest.raises(InvalidRequestError, match=r"entry\.key"):
        fill(cache, token, key="other")
    with pytest.raises(InvalidRequestError, match=r"entry\.namespace"):
        cache.service.fill("acme", token, "answers", "k", Payload(b"", 1.0), cache.clock.now())
    assert fill(cache, token).stored


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda cache: cache.service.delete(cache.plans, "k", cache.clock.now()),
        lambda cache: cache.service.invalidate_keys(cache.plans, ["k"], cache.clock.now()),
        lambda cache: at_once(cache.service.invalidate_prefix(cache.plans, "")),
        lambda cache: at_once(cache.service.invalidate_tags(cache.plans, ["x"])),
        lambda cache: cache.service.invalidate_all(cache.plans),
    ],
    ids=["delete", "keys", "prefix", "tags", "namespace"],
)
async def test_a_fill_that_began_before_an_invalidation_is_discarded(invalidate) -> None:
    cache = Cache()
    outdated = token_of(claim(cache))
    (waiter,) = waiting(cache)
    await asyncio.sleep(0)
    invalidate(cache)
    assert fill(cache, outdated, b"old", tags=("x",)) == Stored(False, 0)
    assert cache.value("k") is None
    assert fill(cache, token_of(await soon(waiter)), b"new", tags=("x",)).stored
    assert cache.value("k") == b"new"


@pytest.mark.parametrize(
    "invalidate",
    [
        lambda cache: cache.service.invalidate_keys(cache.plans, ["l"], cache.clock.now()),
        lambda cache: at_once(cache.service.invalidate_prefix(cache.plans, "l")),
        lambda cache: at_once(cache.service.invalidate_tags(cache.plans, ["y"])),
        lambda cache: cache.service.invalidate_all(cache.space("globex")),
        lambda cache: cache.service.invalidate_all(cache.space("acme", "answers")),
    ],
    ids=["keys", "prefix", "tags", "tenant", "namespace"],
)
def test_an_invalidation_of_something_else_leaves_a_fill_alone(invalidate) -> None:
    cache = Cache()
    token = token_of(claim(cache))
    invalidate(cache)
    assert fill(cache, token, tags=("x",)).stored


async def test_a_write_answers_who_waits_and_the_fill_comes_too_late() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    (waiter,) = waiting(cache)
    await asyncio.sleep(0)
    written = cache.put("k", b"written")
    assert (await soon(waiter)).entry.value == b"written"
    assert fill(cache, token, b"loaded before") == Stored(False, written.version)
    assert cache.value("k") == b"written"


async def test_a_filler_that_gives_up_hands_the_key_to_the_next_who_waits() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    first, second = waiting(cache, 2)
    await asyncio.sleep(0)
    cache.service.give_up("globex", token)
    await asyncio.sleep(0)
    assert not first.done()
    cache.service.give_up("acme", token)
    fill(cache, token_of(await soon(first)), b"v")
    assert (await soon(second)).entry.value == b"v"


async def test_who_leaves_while_waiting_takes_nobody_along() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    first, second, third = waiting(cache, 3)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait((first,))
    assert len(claim(cache).waiters) == 2
    cache.service.give_up("acme", token)
    taken_over = token_of(await soon(second))
    third.cancel()
    await asyncio.wait((third,))
    assert fill(cache, taken_over).stored


async def test_a_filler_that_is_cancelled_fails_nobody_who_waits() -> None:
    """A claim belongs to no call: what ends a filler is its timeout, or its giving up."""
    cache = Cache()

    async def filler() -> None:
        fill(cache, token_of(claim(cache, timeout_s=5.0)), await asyncio.Future())

    cancelled = asyncio.create_task(filler())
    await asyncio.sleep(0)
    first, second = waiting(cache, 2)
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait((cancelled, first, second), return_when=asyncio.FIRST_COMPLETED)
    assert not first.done()
    cache.clock.advance(5.0)
    fill(cache, token_of(await soon(first)), b"v")
    assert (await soon(second)).entry.value == b"v"


async def test_a_claim_that_falls_to_one_who_leaves_at_that_moment_falls_to_the_next() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    first, second = waiting(cache, 2)
    await asyncio.sleep(0)
    cache.service.give_up("acme", token)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(first)
    assert token_of(await soon(second))


async def test_those_who_wait_are_told_when_the_service_stops() -> None:
    cache = Cache()
    claim(cache)
    waiters = waiting(cache, 3)
    await asyncio.sleep(0)
    await cache.service.close()
    for error in await asyncio.gather(*waiters, return_exceptions=True):
        assert isinstance(error, MeshError)
        assert error.reason == "STOPPING"


def test_only_so_many_keys_are_being_filled_at_a_time() -> None:
    cache = Cache(max_claims=2)
    claim(cache, "a")
    token = token_of(claim(cache, "b"))
    with pytest.raises(MeshError) as caught:
        claim(cache, "c")
    assert caught.value.reason == "CLAIMS_EXHAUSTED"
    fill(cache, token, key="b")
    assert token_of(claim(cache, "c"))


def test_a_fill_is_timed_from_its_claim() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    cache.clock.advance(2.5)
    fill(cache, token)
    assert cache.plans.counts.fill_time_s == pytest.approx(2.5)


def test_a_finished_claim_leaves_no_timer_behind() -> None:
    cache = Cache()
    fill(cache, token_of(claim(cache, timeout_s=5.0)))
    assert all(timer.cancelled for timer in cache.clock.timers)
    cache.clock.advance(10.0)
    assert cache.value("k") == b"loaded"


async def test_who_comes_to_wait_when_the_key_was_just_filled_gets_the_value() -> None:
    cache = Cache()
    token = token_of(claim(cache))
    (late,) = waiting(cache)
    assert fill(cache, token).stored, "before the waiter's first step"
    assert (await soon(late)).entry.value == b"loaded"


async def test_who_comes_to_wait_when_the_claim_just_ended_claims_anew() -> None:
    cache = Cache()
    claim(cache)
    (first, second) = waiting(cache, 2)
    cache.service.delete(cache.plans, "k", cache.clock.now())
    token = token_of(await soon(first))
    await asyncio.sleep(0)
    assert not second.done()
    assert fill(cache, token).stored
    assert (await soon(second)).entry.value == b"loaded"
    assert cache.plans.counts.misses == 3, "each lookup is counted once"
